"""Traces of steps, opened as TensorBoard's profiler opens them, and what --profile_steps may be."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from command_line import call, flags

from tarflow_jax.training.profiling import Profile, steps_of


def test_the_trace_holds_its_steps_and_no_others(tmp_path):
    run = jax.jit(lambda x: x @ x)
    x = run(jnp.ones((8, 8)))
    with contextlib.closing(Profile(range(3, 5), tmp_path / 'tensorboard')) as profile:
        for step in range(2, 7):
            with profile.step(step):
                x = run(x)
            profile.after(step, x)
    # Where TensorBoard looks for it.
    [file] = (tmp_path / 'tensorboard' / 'plugins' / 'profile').glob('*/*.xplane.pb')
    traced = [
        dict(event.stats)['step_num']
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines for event in line.events if event.name == 'train'
    ]
    assert sorted(traced) == [3, 4]


def test_a_run_that_ends_within_its_steps_writes_what_it_has(tmp_path):
    with pytest.raises(KeyError), contextlib.closing(Profile(range(1, 9), tmp_path)) as profile:
        with profile.step(1):
            raise KeyError
    assert len(list(tmp_path.glob('plugins/profile/*/*.xplane.pb'))) == 1


def test_steps_that_an_earlier_process_made_are_not_traced(tmp_path):
    with contextlib.closing(Profile(range(1, 3), tmp_path)) as profile:
        with profile.step(3):
            pass
        profile.after(3, None)
    assert not list(tmp_path.iterdir())


def test_steps():
    assert steps_of('5:5', 9) == range(5, 6) and steps_of('2:9', 9) == range(2, 10)


@pytest.mark.parametrize('text, says', [
    ('5', 'is not START:END; give the first and the last'),
    ('0:3', 'is not START:END'), ('4:3', 'is not START:END'), ('a:b', 'is not START:END'),
    ('1:-1', 'is not START:END'), ('8:10', 'ends after step 9, the last of the run; choose an END of at most 9.'),
])
def test_what_names_no_steps(text, says):
    with pytest.raises(ValueError, match=f'--profile_steps={text}.*{says}'):
        steps_of(text, 9)


def test_the_command_line_refuses_it(images, tmp_path, capfd):
    assert call(*flags(tmp_path, images), '--profile_steps=9:13') == 2
    assert 'error: --profile_steps=9:13 ends after step 12, the last of' in capfd.readouterr().err
    assert call(*flags(tmp_path, images), '--mode=evaluate', '--profile_steps=1:2') == 2
    assert '--profile_steps=1:2 has no meaning with --mode=evaluate' in capfd.readouterr().err
