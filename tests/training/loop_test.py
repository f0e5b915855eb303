"""The loop: an interrupted run ends as if nothing had happened."""

import re
import shutil
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import CLOCK, call, flags, metrics, saved, start

from tarflow_jax.training import loop
from tarflow_jax.training.processes import DIVERGED, START_AGAIN
from tarflow_jax.training.state import TrainState

STEPS = 12


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


def at_step(monkeypatch, number, action):
    """Has `action` done when the loop fetches the batch of this step, counted in this process."""
    seen, original = [], loop.sharding.to_devices

    def to_devices(batch, *where):
        seen.append(batch)
        if len(seen) == number:
            action()
        return original(batch, *where)

    monkeypatch.setattr(loop.sharding, 'to_devices', to_devices)
    return seen


def test_what_a_run_leaves(uninterrupted):
    assert {path.name for path in uninterrupted.iterdir()} == {
        'checkpoints', 'evaluation.json', 'metrics.jsonl', 'samples', 'tensorboard'
    }
    assert sorted(path.name for path in (uninterrupted / 'checkpoints').iterdir()) == ['12', '9']
    assert sorted(path.name for path in (uninterrupted / 'samples').iterdir()) == [
        f'step_0000012_{name}.png' for name in ('denoised', 'noise', 'raw')
    ]
    lines = metrics(uninterrupted)
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


def test_stopped_between_checkpoints(uninterrupted, images, tmp_path, monkeypatch):
    class Stopped(BaseException):
        pass

    def stop():
        raise Stopped

    with monkeypatch.context() as patch:
        at_step(patch, 8, stop)
        with pytest.raises(Stopped):
            call(*flags(tmp_path, images))
    assert [line['step'] for line in metrics(tmp_path)] == list(range(1, 8))
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
    assert 'step 3 was skipped, as its gradient was not finite (1 so far)' in said
    assert 'of 3 steps in a row, up to 5, were not finite; the checkpoint at step 1 holds' in said
    assert checkpoints_of(tmp_path) == [1]
    skipped = [line['skipped'] for line in metrics(tmp_path)]
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
    assert ('stopped after step 4, which is not finite and not saved; the same command goes on '
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
    assert [line['step'] for line in metrics(workdir)] == [*range(1, 13), 12, 13, 14, 15, 15]
    assert metrics(workdir)[:13] == metrics(uninterrupted)
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
    train__warmup_epochs=0.01, train__checkpoint_every=48,
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
            wait_for(process, lines, 'step 10:|step 60:')
            end = time.monotonic() + 60
            while not list((workdir / 'checkpoints').glob(name)):
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.002)

        return moment

    def kept():
        return sorted(path.name for path in (workdir / 'checkpoints').iterdir())

    # While the step is compiled.
    output = killed_when(lambda p, lines: wait_for(p, lines, 'parameters, steps 1 to 144'))
    assert 'step 1:' not in output and not (workdir / 'checkpoints').exists()
    # Between checkpoints.
    killed_when(when_there_is('48'))
    assert kept() == ['48']
    assert len(metrics(workdir)) > 48
    # While one is written.
    output = killed_when(when_there_is('96.*'))
    assert 'continuing from the checkpoint at step 48' in output
    assert kept() == ['48', '96.orbax-checkpoint-tmp']

    output = finish(start(*flags(workdir, **SLOW)), [])
    assert 'continuing from the checkpoint at step 48' in output
    # The programs of the killed runs are kept in the workdir.
    saving = re.search(r'(\d+) programs of earlier runs were reused, which saved ([\d.]+) s', output)
    assert int(saving[1]) >= 1 and float(saving[2]) > 0.5 and any((workdir / 'compiled').iterdir())
    assert metrics(workdir) == metrics(wanted)
    assert len(metrics(wanted)) == 145
    assert saved(workdir, 144) == saved(wanted, 144)
    assert kept() == ['144', '96']


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
    wait_for(process, lines, r'step 100:')
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in rest
    step = int(re.search(r'stopped after step (\d+), which is saved', rest)[1])
    assert step >= 100  # the line is written within the step
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == [str(step)]


def test_the_clock_counts_what_did_not_go_into_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(loop.time, 'perf_counter', lambda: now[0])
    clock = loop._Clock(batch_size=8, flops_per_image=3.0)

    def passing(seconds, within=None):
        with within or loop.NO_PAUSE:
            now[0] += seconds

    passing(20.0, clock.paused())  # restoring, compiling
    passing(10.0, clock.waiting())
    passing(10.0)
    assert clock.speed(1) == {'goodput': 0.25}
    passing(5.0, clock.waiting())
    passing(15.0)
    passing(40.0, clock.paused())  # pictures
    assert clock.speed(6) == {
        'images_per_second': 2.0, 'model_flops_per_second': 6.0, 'data_wait': 0.25,
        'goodput': 0.25,  # 25 of 100 seconds
    }
