"""The loop: an interrupted run ends as if nothing had happened."""

import json
import re
import shutil
import signal
import time
from types import SimpleNamespace

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import CLOCK, call, metrics, saved, start

import tarflow_jax as tfj
from tarflow_jax import config as configs
from tarflow_jax import json_files
from tarflow_jax.training import loop, sharding, validation
from tarflow_jax.training.processes import DIVERGED, START_AGAIN
from tarflow_jax.training.state import TrainState

STEPS = 12


def flags(workdir, images=None, **fields):
    """A run that validates at steps 4 and 8, and for the checkpoints at 3, 6, 9 and 12."""
    validating = dict(train__validate_every=4, train__validation_images=10)
    return command_line.flags(workdir, images, **validating | fields)


@pytest.fixture(scope='module')
def uninterrupted(images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('uninterrupted')
    assert call(*flags(workdir, images)) == 0
    return workdir


def assert_same_run(workdir, wanted):
    assert metrics(workdir) == metrics(wanted)
    found, state = saved(workdir, STEPS), saved(wanted, STEPS)
    assert found.keys() == state.keys()
    assert [name for name in state if found[name] != state[name]] == []


def at_step(monkeypatch, number, action, begin=0):
    """Has `action` done when the loop fetches the batch of this step, counted in this process.

    Returns the batches of the steps, after `begin` others.
    """
    seen = [None] * begin

    def to_devices(batch, *where):
        seen.append(batch)
        if len(seen) == number:
            action()
        return sharding.to_devices(batch, *where)

    # Of the loop alone: validation brings its batches to the devices, too.
    names = {name: getattr(sharding, name) for name in dir(sharding) if name[0] != '_'}
    monkeypatch.setattr(loop, 'sharding', SimpleNamespace(**names | {'to_devices': to_devices}))
    return seen


def test_what_a_run_leaves(uninterrupted):
    assert {path.name for path in uninterrupted.iterdir()} == {
        'checkpoints', 'evaluation.json', 'metrics.jsonl', 'samples', 'tensorboard'
    }
    assert sorted(path.name for path in (uninterrupted / 'checkpoints').iterdir()) == ['12', '9']
    assert sorted(path.name for path in (uninterrupted / 'samples').iterdir()) == [
        'noise.png', *(f'step_0000012_{name}.png' for name in ('denoised', 'raw'))
    ]
    lines = metrics(uninterrupted)
    validated = [line for line in lines if 'validation/loss' in line]
    assert [line['step'] for line in validated] == [3, 4, 6, 8, 9, 12]
    assert set(validated[0]) == {
        'step', 'validation/loss', 'validation/bits_per_dim', 'validation/train_loss',
        'validation/train_bits_per_dim',
    }
    lines = [line for line in lines if line not in validated]
    assert [line['step'] for line in lines] == [*range(1, 13), 12]
    assert lines[-1] == {'step': 12, 'samples/redraws': 0.0}
    assert set(lines[0]) == {
        'step', 'loss', 'prior', 'logdet', 'gradient_norm', 'mean_square/block_0',
        'learning_rate', 'epoch', 'skipped',
    }
    np.testing.assert_allclose([line['epoch'] for line in lines[:12]], np.arange(1, 13) / 6)
    # Three steps of warm-up; the first update uses the floor, step 4 the peak.
    rates = [line['learning_rate'] for line in lines[:12]]
    assert rates[0] == pytest.approx(1e-6) and rates[3] == max(rates) > 1e-4
    assert lines[11]['loss'] < lines[0]['loss']
    text = (uninterrupted / 'metrics.jsonl').read_text().splitlines()
    assert [all(name in line for name in CLOCK) for line in text[:3]] == [False, True, True]


def test_validation_leaves_training_alone(uninterrupted, trained):
    # The same run without it, to the bit.
    assert saved(uninterrupted, STEPS) == saved(trained, STEPS)
    others = [line for line in metrics(uninterrupted) if 'validation/loss' not in line]
    assert others == metrics(trained)


def test_validated_with_what_the_checkpoint_holds(uninterrupted, images):
    # The averaged parameters, and what evaluation says of them.
    config = tfj.load_config(uninterrupted)
    model, variables = tfj.load(uninterrupted)
    plan = configs.plan(config)
    sets = (configs.source(config, split, model) for split in ('test', 'train'))
    mesh = sharding.make_mesh()
    variables = jax.device_put(variables, sharding.replicated(mesh))
    found = validation.validate(
        model, plan.recipe, variables, *sets, images=10, seed=0, mesh=mesh, batch_size=8
    )
    [line] = [x for x in metrics(uninterrupted) if x['step'] == 12 and 'validation/loss' in x]
    for name, value in found.items():
        assert line[name] == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
def test_the_best_survives_what_comes_after_it(images, tmp_path, monkeypatch, capfd):
    losses = {3: 1.0, 4: 0.0, 6: 0.5, 8: float('nan'), 9: 2.0, 12: 1.5}
    names = ('loss', 'bits_per_dim', 'train_loss', 'train_bits_per_dim')

    def validate(*_, variables, **__):
        return {f'validation/{name}': losses[len(seen)] for name in names}

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    monkeypatch.setattr(loop.validation, 'validate', validate)
    with monkeypatch.context() as patch:
        seen = at_step(patch, 11, kill)
        with pytest.raises(Killed):
            call(*flags(tmp_path, images))
    assert checkpoints_of(tmp_path) == [6, 9]
    seen = at_step(monkeypatch, 99, None, begin=9)
    assert call(*flags(tmp_path, images)) == 0
    assert checkpoints_of(tmp_path) == [6, 9, 12]
    said = capfd.readouterr().err
    assert 'step 6 has the lowest validation loss; --step=best chooses its checkpoint' in said
    _, best = tfj.load(tmp_path, step='best')
    _, wanted = tfj.load(tmp_path, step=6)
    _, newest = tfj.load(tmp_path)
    same = lambda a, b: all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))  # noqa: E731
    assert same(best, wanted) and not same(best, newest)
    assert call(f'--workdir={tmp_path}', '--step=best', '--mode=sample') == 0
    assert f'13 samples of step 6 of {tmp_path}' in capfd.readouterr().err
    for step, says in (('7', 'no checkpoint at step 7; there are 6, 9, 12.'),
                       ('last', "--step=last must be the number of a step, or 'best'.")):
        assert call(f'--workdir={tmp_path}', f'--step={step}', '--mode=sample') == 2
        assert says in capfd.readouterr().err


def test_stopped_between_checkpoints(uninterrupted, images, tmp_path, monkeypatch):
    class Stopped(BaseException):
        pass

    def stop():
        raise Stopped

    with monkeypatch.context() as patch:
        at_step(patch, 8, stop)
        with pytest.raises(Stopped):
            call(*flags(tmp_path, images))
    assert [line['step'] for line in metrics(tmp_path)] == [1, 2, 3, 3, 4, 4, 5, 6, 6, 7]
    seen = at_step(monkeypatch, 99, stop)
    assert call(*flags(tmp_path, images)) == 0
    assert len(seen) == STEPS - 6  # from the checkpoint at step 6
    assert_same_run(tmp_path, uninterrupted)


def test_ctrl_c_saves_and_the_same_command_goes_on(
    uninterrupted, images, tmp_path, monkeypatch, capfd
):
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        assert call(*flags(tmp_path, images)) == 130
    assert 'stopped after step 5, which is saved' in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['3', '5']
    seen = at_step(monkeypatch, 99, None)
    assert call(*flags(tmp_path, images)) == 0
    assert len(seen) == STEPS - 5
    assert_same_run(tmp_path, uninterrupted)


def test_second_ctrl_c_leaves_at_once(images, tmp_path, monkeypatch):
    def press_twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 2, press_twice)
    assert call(*flags(tmp_path, images)) == 130
    assert [line['step'] for line in metrics(tmp_path)] == [1]


def test_finished_run_trains_no_more(uninterrupted, images, tmp_path, monkeypatch):
    workdir = shutil.copytree(uninterrupted, tmp_path / 'run')
    seen = at_step(monkeypatch, 99, None)
    assert call(*flags(workdir, images)) == 0
    assert seen == []
    assert_same_run(workdir, uninterrupted)


# The second update makes the parameters huge; every gradient after it overflows.
DIVERGING = dict(train__peak_learning_rate=1e30, train__stop_after_skipped=3)


def checkpoints_of(workdir):
    return sorted(int(path.name) for path in (workdir / 'checkpoints').glob('*'))


def test_diverged_run_stops_with_its_last_good_state(images, tmp_path, capfd):
    # The state of step 2 is saved, and turns out to be bad.
    assert call(*flags(tmp_path, images, **DIVERGING, train__checkpoint_every=1)) == DIVERGED
    said = capfd.readouterr().err
    assert 'skipped step 3, as its gradient was not finite (1 skipped so far)' in said
    assert 'of 3 steps in a row, up to 5, were not finite; the checkpoint at step 1 holds' in said
    assert checkpoints_of(tmp_path) == [1]
    skipped = [line['skipped'] for line in metrics(tmp_path) if 'skipped' in line]
    assert skipped[:5] == [0, 0, 1, 2, 3]


def test_diverged_run_keeps_the_checkpoint_it_began_from(uninterrupted, images, tmp_path, capfd):
    workdir = shutil.copytree(uninterrupted, tmp_path / 'run')
    diverging = DIVERGING | dict(train__epochs=4.0, train__checkpoint_every=1)
    assert call(*flags(workdir, images, **diverging)) == DIVERGED
    assert 'the checkpoint at step 12 holds the last good state' in capfd.readouterr().err
    assert checkpoints_of(workdir) == [12]
    assert saved(workdir, 12) == saved(uninterrupted, 12)


@pytest.mark.parametrize('limit, steps', [(3, '3 steps in a row, up to 5'),
                                          (100, '10 steps in a row, up to 12')])
def test_diverged_before_the_first_checkpoint(images, tmp_path, capfd, limit, steps):
    # With a limit that it cannot reach, the run ends as diverged nevertheless.
    diverging = DIVERGING | dict(train__stop_after_skipped=limit)
    assert call(*flags(tmp_path, images, **diverging)) == DIVERGED
    said = capfd.readouterr().err
    assert f'{steps}, were not finite; no checkpoint holds a good state: start again' in said
    assert checkpoints_of(tmp_path) == []


def test_skipped_step_is_not_saved_when_the_run_is_stopped(images, tmp_path, monkeypatch, capfd):
    at_step(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGTERM))
    assert call(*flags(tmp_path, images, **DIVERGING)) == START_AGAIN
    assert ('stopped after step 4, which is not finite and not saved; the same command resumes '
            'from the beginning') in capfd.readouterr().err
    assert checkpoints_of(tmp_path) == []


def test_a_state_that_overflowed_is_not_good():
    # Its gradient was finite and the update was not.
    good = TrainState(jnp.int32(1), {'w': jnp.ones(2)}, None, (), None, jnp.int32(0))
    bad = good._replace(params={'w': jnp.array([1.0, jnp.inf])})
    watch = loop._Watch(3, good, None)
    assert watch.is_good(good) and not watch.is_good(bad)


@pytest.mark.slow
def test_more_epochs_lengthen_a_finished_run(uninterrupted, images, tmp_path, monkeypatch):
    workdir = shutil.copytree(uninterrupted, tmp_path / 'run')
    with (workdir / 'metrics.jsonl').open('ab') as file:
        file.write(b'\xff{"step": 13, "lo')
    seen = at_step(monkeypatch, 99, None)
    assert call(*flags(workdir, images, train__epochs=2.5)) == 0
    assert len(seen) == 3
    before = len(metrics(uninterrupted))
    assert [line['step'] for line in metrics(workdir)[before:]] == [13, 14, 15, 15, 15]
    assert metrics(workdir)[:before] == metrics(uninterrupted)
    assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['12', '15']


def wait_for(process, lines, pattern, seconds=120):
    """Reads the process's output until a line matches."""
    end = time.monotonic() + seconds
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return
        assert time.monotonic() < end, lines
    pytest.fail(f'no line matches {pattern!r} in {"".join(lines)}')


def finish(process, lines):
    rest, _ = process.communicate(timeout=180)
    assert process.returncode == 0, ''.join(lines) + rest
    return rest


SLOW = dict(
    model__image_size=28, model__patch_size=4, model__width=64, model__head_dim=64,
    model__layers_per_block='(1,1)', model__num_classes=10, train__epochs=144 / 625,
    train__warmup_epochs=0.01, train__checkpoint_every=48, train__validate_every=1000,
)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    # Processes as a user starts them, on the embedded images, killed and started again.
    wanted, workdir = tmp_path / 'wanted', tmp_path / 'killed'
    finish(start(*flags(wanted, **SLOW)), [])

    def killed_when(moment):
        lines = []
        process = start(*flags(workdir, **SLOW))
        moment(process, lines)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        return ''.join(lines)

    def when_there_is(name):
        def moment(process, lines):
            wait_for(process, lines, r'step (1|49)/144: ')
            end = time.monotonic() + 60
            while not list((workdir / 'checkpoints').glob(name)):
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.002)

        return moment

    def kept():
        return sorted(path.name for path in (workdir / 'checkpoints').iterdir())

    # While the step is compiled.
    output = killed_when(lambda p, lines: wait_for(p, lines, 'parameters, steps 1 to 144'))
    assert 'step 1/' not in output and not (workdir / 'checkpoints').exists()
    # Between checkpoints.
    killed_when(when_there_is('48'))
    assert kept() == ['48']
    assert len(metrics(workdir)) > 48
    # None that comes later can be better.
    about = workdir / 'checkpoints' / '48' / 'about' / 'metadata'
    content = json_files.read(about)
    content['validation']['loss'] = -1e3
    about.write_text(json.dumps(json_files.sealed(content)))
    # While one is written.
    output = killed_when(when_there_is('96.*'))
    assert 'resuming from the checkpoint at step 48' in output
    assert kept() == ['48', '96.orbax-checkpoint-tmp']

    compiled = {path.name for path in (workdir / 'compiled').iterdir()}
    output = finish(start(*flags(workdir, **SLOW)), [])
    assert 'resuming from the checkpoint at step 48' in output
    # The train step of the killed runs is reused.
    new = {path.name for path in (workdir / 'compiled').iterdir()} - compiled
    assert compiled and not any('train_step' in name for name in new)
    assert metrics(workdir) == metrics(wanted)
    assert len(metrics(wanted)) == 148  # with three validations and the last samples
    assert saved(workdir, 144) == saved(wanted, 144)
    assert kept() == ['144', '48', '96']


# The handler that a process in a terminal has; one in the background of a shell ignores Ctrl-C.
IN_A_TERMINAL = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from tarflow_jax.main import main
sys.exit(main(sys.argv))
"""


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(images, tmp_path):
    # Real steps, at a moment that the signal chooses: most of them lie inside of a step.
    longer = dict(train__epochs=400.0, train__log_every=50, train__checkpoint_every=10000)
    lines = []
    process = start(*flags(tmp_path, images, **longer), program=('-c', IN_A_TERMINAL))
    wait_for(process, lines, r'step 50/')
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in rest
    assert 'stopping after this step' in rest
    step = int(re.search(r'stopped after step (\d+), which is saved', rest)[1])
    assert step >= 50  # the line is written within the step
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == [str(step)]
