"""Entries for Weights & Biases, beside the files: with the package's place taken, and offline."""

import importlib.util
import sys
import time
import types

import numpy as np
import pytest
from command_line import call, flags

from tarflow_jax.training import wandb_writer
from tarflow_jax.training.metrics import MetricWriter, read
from tarflow_jax.training.wandb_writer import WandbWriter

PICTURE = np.zeros((4, 6, 1), np.uint8)


def write(workdir, resume_step=0):
    with WandbWriter(
        MetricWriter(workdir, resume_step=resume_step), 'flows', workdir, {'seed': 3}
    ) as writer:
        writer.write_scalars(resume_step + 1, {'loss': np.float32(0.5)})
        writer.write_images(resume_step + 1, {'samples/raw': PICTURE})
        writer.flush()


def test_entries_go_to_the_files_and_to_one_run(tmp_path, monkeypatch):
    runs, logged = [], []
    run = types.SimpleNamespace(
        log=lambda entry, step: logged.append((step, entry)), finish=lambda: logged.append('end')
    )

    def init(**given):
        runs.append(given)
        return run

    fake = types.SimpleNamespace(init=init, Image=lambda pixels: pixels.shape)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    for step in (0, 1):  # the second process goes on with the same run
        write(tmp_path / 'flow', step)
    assert [entry['step'] for entry in read(tmp_path / 'flow')] == [1, 2]
    assert logged == [
        entry for step in (1, 2)
        for entry in ((step, {'loss': 0.5}), (step, {'samples/raw': (4, 6)}), 'end')
    ]
    first, second = runs
    assert first == second and len(first.pop('id')) == 16
    assert first == {
        'project': 'flows', 'name': 'flow', 'resume': 'allow', 'config': {'seed': 3},
        'dir': str(tmp_path / 'flow'),
    }


def test_without_the_package_the_field_is_refused(images, tmp_path, monkeypatch, capfd):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        wandb_writer.importlib.util, 'find_spec', lambda name: None if name == 'wandb' else find(name)
    )
    assert call(*flags(tmp_path / 'run', images, train__wandb_project='flows')) == 2
    assert (
        "error: train.wandb_project 'flows' needs the package wandb; install it with pip install "
        "'tarflow-jax[wandb]', or leave the field empty."
    ) in capfd.readouterr().err
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_offline(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    write(tmp_path / 'flow')
    [run] = (tmp_path / 'flow' / 'wandb').glob('offline-run-*')
    run_id = (tmp_path / 'flow' / wandb_writer.FILE).read_text().strip()
    [log] = run.glob('*.wandb')
    assert run.name.endswith(run_id) and log.name == f'run-{run_id}.wandb'
    for _ in range(300):  # another process writes it
        written = log.read_bytes()
        if b'flows' in written and b'loss' in written:
            break
        time.sleep(0.1)
    assert b'flows' in written and b'loss' in written
    assert list(run.glob('files/media/images/samples/raw_1_*.png'))
