"""The lock of a folder in a bucket: one process at a time, and none that is gone stops another."""

import os
import socket
import subprocess
import time

import pytest

from tarflow_jax import bucket_lock, lock, paths

HOLDER = f'process {os.getpid()} on {socket.gethostname()}'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bucket_lock, 'BEAT', 0.1)
    monkeypatch.setattr(bucket_lock, 'STALE', 0.5)


def write(bucket, host='elsewhere', beat=0):
    (paths.of(bucket) / lock.FILE).write_text(f'process 7 on {host}\n{host}\ntoken\n{beat}')


def test_a_folder_is_held_by_one_at_a_time(bucket):
    path = paths.of(bucket) / lock.FILE
    lock.check(bucket)
    assert not path.exists()
    with lock.held(bucket):
        assert path.read_text().startswith(f'{HOLDER}\n')
        for take in (lambda: lock.check(bucket), lock.held(bucket).__enter__):
            with pytest.raises(lock.Taken) as error:
                take()
            assert str(error.value).startswith(f'{HOLDER} is writing to {bucket}; wait for it')
    assert not path.exists()
    with lock.held(bucket):
        pass


def test_a_lock_that_is_renewed_is_held(bucket, monkeypatch):
    write(bucket)
    beats = iter(range(1, 100))
    monkeypatch.setattr(bucket_lock.time, 'sleep', lambda _: write(bucket, beat=next(beats)))
    with pytest.raises(lock.Taken, match=f'^process 7 on elsewhere is writing to {bucket}; '):
        lock.check(bucket)


def test_a_lock_that_is_not_renewed_was_left_behind(bucket, caplog):
    write(bucket)
    start = time.monotonic()
    with lock.held(bucket):
        assert 0.5 <= time.monotonic() - start < 5
        assert 'of process 7 on elsewhere' in caplog.text
        assert (paths.of(bucket) / lock.FILE).read_text().startswith(HOLDER)


def test_lock_of_a_dead_process_of_this_machine_stops_nobody(bucket, monkeypatch, caplog):
    with subprocess.Popen(['true']) as process:
        process.wait()
    monkeypatch.setattr(bucket_lock, 'STALE', 1000)  # is not waited for
    for number in (process.pid, os.getpid()):  # the latter of a start before this one
        (paths.of(bucket) / lock.FILE).write_text(
            f'process {number} on {socket.gethostname()}\n{bucket_lock._machine()}\ntoken\n0'
        )
        lock.check(bucket)
        assert f'{lock.FILE} of process {number} on' in caplog.text
    assert not (paths.of(bucket) / lock.FILE).exists()


def test_a_process_whose_lock_was_taken_over_ends(bucket, monkeypatch, caplog):
    codes = []
    monkeypatch.setattr(bucket_lock.os, '_exit', codes.append)
    with lock.held(bucket):
        write(bucket)
        while not codes:
            time.sleep(0.05)
    assert codes == [2]
    assert f'{bucket}/lock was taken over by process 7 on elsewhere; this process' in caplog.text
    assert (paths.of(bucket) / lock.FILE).read_text().startswith('process 7')  # left to its owner
