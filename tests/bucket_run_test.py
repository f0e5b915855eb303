"""A run whose workdir is in a bucket: killed, resumed, sampled, scored and shown."""

import signal
import time

import pytest
from command_line import call, flags, metrics, saved, start_processes

from tarflow_jax import paths, scoring


@pytest.mark.slow
def test_killed_and_resumed(bucket, images, trained, capfd):
    # The devices of this process, so that the bits are those of `trained`.
    program = ('-m', 'tarflow_jax.main')
    [process] = start_processes(1, program, *flags(bucket, images), devices=8)
    end = time.monotonic() + 240
    complete = paths.of(bucket) / 'checkpoints' / '3' / 'commit_success.txt'
    while not complete.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    fields = dict(evaluate__metrics='("bits_per_dim",)', sample__method='auto')
    assert call(*flags(bucket, images, **fields)) == 0
    assert 'resuming from the checkpoint at step' in capfd.readouterr().err
    for step in (9, 12):
        assert saved(bucket, step) == saved(trained, step)
    assert metrics(bucket) == metrics(trained)
    assert scoring.read(bucket)['scores']['bits_per_dim']['images'] == 20
    assert call(*flags(bucket, images, **fields), '--mode=sample') == 0
    small = dict(report__rows=1, report__columns=1, report__guidance_weights='()')
    assert call(*flags(bucket, images, **small), '--mode=report') == 0
    there = {path.name for path in paths.of(bucket).iterdir()}
    assert there == {
        'checkpoints', 'evaluation.json', 'metrics.jsonl', 'report.html', 'report.json', 'samples',
        'schedules', 'tensorboard',
    }


def test_a_missing_bucket_ends_the_command_line(emulator, images, capfd):
    assert call(*flags('gs://no-such-bucket/r', images)) == 2
    assert capfd.readouterr().err.strip().splitlines()[-1].endswith(
        'error: --workdir=gs://no-such-bucket/r: the bucket no-such-bucket does not exist; create it with '
        'gcloud storage buckets create, or correct the name.'
    )
