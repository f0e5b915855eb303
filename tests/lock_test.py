"""The lock: one writer at a time in a folder."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from command_line import ROOT

from tarflow_jax import lock

HOLDER = """
import sys, time
from tarflow_jax import lock
with lock.held(sys.argv[1]):
    print('held', flush=True)
    time.sleep(100)
"""


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    folder = tmp_path / 'new' / 'run'
    lock.check(folder)
    assert not folder.parent.exists()
    with lock.held(folder):
        holder = f'process {os.getpid()} on {socket.gethostname()}'
        assert (folder / lock.FILE).read_text() == holder
        for take in (lambda: lock.check(folder), lock.held(folder).__enter__):
            with pytest.raises(lock.Taken) as error:
                take()
            assert str(error.value).startswith(f'{holder} is writing to {folder}; wait for it')
        assert (folder / lock.FILE).read_text() == holder
    assert list(folder.iterdir()) == []
    with lock.held(folder):
        pass


def test_lock_of_a_killed_process_stops_nobody(tmp_path, caplog):
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    with subprocess.Popen([sys.executable, '-c', HOLDER, str(tmp_path)], env=environment,
                          stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == 'held\n'
        with pytest.raises(lock.Taken, match=f'process {process.pid} on'):
            lock.check(tmp_path)
        process.send_signal(signal.SIGKILL)
    lock.check(tmp_path)
    with lock.held(tmp_path):
        assert f'of process {process.pid} on' in caplog.text
        assert str(os.getpid()) in (tmp_path / lock.FILE).read_text()
