"""The config that a checkpoint holds, and what of it a command takes."""

import json
import shutil

import pytest
from command_line import QUICKSTART, call, flags

from tarflow_jax import config as configs
from tarflow_jax import config_of_run, json_files, main
from tarflow_jax.training import loop


def parsed(*given):
    return main._parse(['main', *map(str, given)]).config


def test_without_a_config_that_of_the_checkpoint_is_taken(trained, images, caplog):
    caplog.set_level('INFO', 'tarflow_jax')
    config = parsed(f'--workdir={trained}', '--mode=sample')
    wanted = parsed(*flags(trained, images))
    assert config.to_dict() == wanted.to_dict()
    assert caplog.messages == [f'the config is that of step 12 of {trained}']
    config = parsed(
        f'--workdir={trained}', '--config.sample.count=7', '--config.train.noise_std=0.2',
        '--config.model.layers_per_block=(1,)', '--mode=sample',
    )
    assert config.sample.count == 7 and config.model.layers_per_block == (1,)
    assert caplog.messages[-1] == (
        f'the config is that of step 12 of {trained}, with sample.count 7 instead of 13, '
        'train.noise_std 0.2 instead of 0.1'
    )


def test_a_file_leaves_the_model_and_the_noise_to_the_checkpoint(trained, images, caplog):
    caplog.set_level('INFO', 'tarflow_jax')
    given = [QUICKSTART, f'--workdir={trained}', '--config.model.head_dim=32', '--mode=evaluate']
    config = parsed(*given)
    assert config.model.width == 32 and config.model.num_classes == 5
    assert config.model.head_dim == 32  # the command says so
    assert config.train.batch_size == 64  # of the file
    [message] = caplog.messages
    assert f'taken from step 12 of {trained}, because the command does not set them:' in message
    assert 'model.width 32 instead of 64' in message and 'head_dim' not in message
    # Training has the config that it is given, and says what differs; see below.
    assert parsed(*given[:-1]).model.width == 64


def test_noise_of_another_run_is_not_left_out(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    path = workdir / 'checkpoints' / '12' / 'about' / 'metadata'
    about = json_files.read(path)  # without its seal
    about['config']['train'] |= {'noise': 'uniform', 'noise_std': 0.25}
    path.write_text(json.dumps(about))
    config = parsed(QUICKSTART, f'--workdir={workdir}', '--mode=sample')
    assert (config.train.noise, config.train.noise_std) == ('uniform', 0.25)
    about['config']['model']['width'] = 'wide'
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="model.width .* is 'wide', but must be a whole number"):
        parsed(f'--workdir={workdir}', '--mode=sample')


@pytest.mark.parametrize('content', ['', '[]', '{"config": 3}', '[' * 10**5, '{"config": {}}', '\0'])
def test_metadata_that_says_nothing(tmp_path, content):
    folder = tmp_path / 'checkpoints' / '3' / 'about'
    folder.mkdir(parents=True)
    (folder / 'metadata').write_text(content)
    assert config_of_run.saved(tmp_path) is None
    with pytest.raises(ValueError, match='--config is missing, and --workdir=.* has no checkpoint; pass'):
        parsed(f'--workdir={tmp_path}', '--mode=sample')


def test_fields_of_the_machine_stay_with_it(tmp_path):
    there = configs.default()
    there.mesh.fsdp, there.model.attention = 4, 'splash'
    folder = tmp_path / 'checkpoints' / '3' / 'about'
    folder.mkdir(parents=True)
    (folder / 'metadata').write_text(json.dumps({'config': there.to_dict()}))
    reading = parsed(f'--workdir={tmp_path}', '--mode=sample')
    assert reading.mesh.fsdp == 1 and reading.model.attention == 'auto'
    assert parsed(f'--workdir={tmp_path}').mesh.fsdp == 4


def resumed(monkeypatch, capfd, *given) -> str:
    """What a start of training says, before anything is compiled."""
    def stop(*_):
        raise loop.Stopped(75)

    monkeypatch.setattr(loop, 'train', stop)
    capfd.readouterr()
    call(*given)
    return capfd.readouterr().err


def test_settings_that_changed_are_said(trained, images, tmp_path, monkeypatch, capfd):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    assert 'changed since the checkpoint' not in resumed(
        monkeypatch, capfd, *flags(workdir, images, train__log_every=5, sample__count=3)
    )
    said = resumed(monkeypatch, capfd, *flags(
        workdir, images, seed=7, train__batch_size=8, train__noise_std=0.2, train__b2=0.9,
        train__peak_learning_rate=0.01, data__flip=True, train__epochs=3.0,
    ))
    [line] = [line for line in said.splitlines() if 'changed since the checkpoint at step 12' in line]
    for words in (
        'seed 7 instead of 0', 'train.batch_size 8 instead of 16', 'data.flip True instead of',
        'train.noise_std 0.2 instead of 0.1', 'train.b2 0.9 instead of 0.95',
        'train.peak_learning_rate 0.01 instead of', 'train.epochs 3.0 instead of 2.0',
    ):
        assert words in line


def test_another_set_is_said(trained, images, tmp_path, monkeypatch, capfd):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    other = tmp_path / 'others'
    shutil.copytree(images, other)
    said = resumed(monkeypatch, capfd, *flags(workdir, other))
    name = f"{images.name}, 96 images of split 'train'"
    assert f"training set others, 96 images of split 'train' instead of {name}" in said


def test_fewer_epochs_than_done(trained, images, capfd):
    assert call(*flags(trained, images, train__epochs=1.5)) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert 'train.epochs 1.5 is 9 steps, but' in line and 'a checkpoint at step 12' in line
    assert 'set more epochs than 2, or another --workdir' in line
