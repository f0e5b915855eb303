"""What users get wrong at the command line."""

import os
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from command_line import (
    COND_GRAY,
    OFFICIAL,
    QUICKSTART,
    ROOT,
    call,
    compilations,
    files,
    flags,
    metrics,
    saved,
    start,
)
from parity_cases import FOLDER, Case

from tarflow_jax import commands, config_paths, lock, main
from tarflow_jax.training import checkpoint
from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.metrics import MetricWriter
from tarflow_jax.training.optimizer import adamw
from tarflow_jax.training.state import abstract_state


@pytest.fixture
def refused(capfd):
    """Asserts that a command line is refused before anything is compiled, in one line."""

    def check(arguments, *words, code=2):
        capfd.readouterr()
        before = len(compilations)
        assert call(*arguments) == code
        error = capfd.readouterr().err
        assert len(compilations) == before
        assert error.count('\n') == 1 and 'Traceback' not in error
        sentence = re.sub(r'^\d\d:\d\d:\d\d error: ', '', error)
        assert sentence != error
        for word in words:
            assert str(word) in sentence
        return sentence

    return check


@pytest.mark.parametrize('given, words', [
    # The config and its fields.
    (['--config.model.widht=64'], ["no field 'model.widht'", "did you mean 'model.width'?"]),
    (['--config.trian.epochs=1'], ["no field 'trian.epochs'", "did you mean 'train.epochs'?"]),
    (['--config.evaluate.frechet.wieghts=x'], ["did you mean 'evaluate.frechet.weights'?"]),
    (['--config.epochs=1'], ["no field 'epochs'", "did you mean 'train.epochs'?"]),
    (['--config.noise_std=1'], ["did you mean 'train.noise_std'?"]),
    (['--noconfig.data.flpi'], ["no field 'data.flpi'", "did you mean 'data.flip'?"]),
    (['--config.zzz=1'], ["no field 'zzz'", 'tarflow_jax/config.py']),
    (['--config.train.batch_size=abc'], ['config.train.batch_size', "'abc'"]),
    (['--config.train.batch_size=2.5'], ['config.train.batch_size', "'2.5'"]),
    (['--config.data.flip=maybe'], ['config.data.flip', 'maybe']),
    (['--config.model=3'], ['--config.model', '--help']),
    (['--config=configs/nosuch.py'], ['--config=configs/nosuch.py: the file does not exist',
                                      'there are', 'fashion_mnist.py', 'imagenet64.py']),
    (['--config=configs/imagnet64.py:cond'], ['the file does not exist; did you mean', 'configs/imagenet64.py?']),
    (['--config=fashion_mnist'], ['the file does not exist; did you mean', 'configs/fashion_mnist.py?']),
    ([f'--config={ROOT}/configs/imagenet64.py:mnist'], ["variant 'mnist'", 'bpd, uncond, cond']),
    ([f'--config={ROOT}/configs/imagenet64.py:bpd,cond'], ['exclude each other']),
    ([f'{QUICKSTART}:cond'], ['get_config()']),
    # The flags.
    (['--wrokdir=x'], ['--wrokdir is not a flag; did you mean --workdir?']),
    (['--workdri=x'], ['--workdri is not a flag; did you mean --workdir?']),
    (['--confg=x.py'], ['--confg is not a flag; did you mean --config?']),
    (['--epochs=3'], ['--epochs is not a flag; did you mean --config.train.epochs?']),
    (['--model.width=3'], ['did you mean --config.model.width?']),
    (['--zzz'], ['--zzz is not a flag; --help lists the flags.']),
    (['--mode=test'], ['--mode=test', 'train|sample|evaluate|report|likelihood']),
    (['--mode=smaple'], ['--mode=smaple', "did you mean 'sample'?"]),
    (['--distributed=onn'], ['--distributed=onn', "did you mean 'on'?"]),
    (['train'], ["'train' is not a flag"]),
    (['--workdir='], ['--workdir is missing']),
    (['--input=x.pth'], ['x.pth has no meaning with --mode=train']),
    (['--output=x.safetensors'], ['x.safetensors has no meaning with --mode=train']),
    (['--mode=report'], ['holds no checkpoint']),
    (['--mode=report', '--input=x.pth'], ['x.pth has no meaning with --mode=report']),
    # The model.
    (['--config.model.patch_size=5'], ['model.image_size 16', 'patch_size 5', 'divides']),
    (['--config.model.patch_size=0'], ['patch_size 0']),
    (['--config.model.width=65'], ['model.width 65', 'head_dim 16']),
    (['--config.model.layers_per_block=()'], ['model.layers_per_block ()']),
    (['--config.model.layers_per_block=(1,0)'], ['model.layers_per_block (1, 0)']),
    (['--config.model.layers_per_block=(1.5,)'], ['model.layers_per_block (1.5,)', 'whole']),
    (["--config.model.layers_per_block=('a',)"], ["model.layers_per_block ('a',)", 'whole']),
    (['--config.model.dtype=float16'], ["model.dtype 'float16'", 'float32, bfloat16']),
    (['--config.model.remat=all'], ["model.remat 'all'", 'none, layer, dots']),
    (['--config.model.unroll=0'], ['model.unroll 0']),
    (['--config.model.image_size=(16,8,4)'], ['model.image_size (16, 8, 4)', '(height, width)']),
    (['--config.model.image_size=(16,12)'], ['model.image_size (16, 12)', 'patch_size 8']),
    (['--config.model.scale=linear'], ["model.scale 'linear'", 'exp, softplus']),
    (['--config.model.scale_limit=-1.0'], ['model.scale_limit -1.0']),
    (['--config.model.first_token=none'], ["model.first_token 'none'", 'identity, start']),
    (['--config.model.orders=zigzag'], ['model.orders', 'zigzag']),
    (['--config.model.orders=((0,1,2,2),)'], ['model.orders']),
    (['--config.model.num_features=-1'], ['model.num_features -1']),
    (['--config.model.num_features=2'], ['model.num_features', 'the train set']),
    # Training.
    (['--config.seed=-1'], ['seed -1']),
    (['--config.seed=4294967296'], ['seed 4294967296']),
    (['--config.train.epochs=0'], ['train.epochs 0.0 must be above 0']),
    (['--config.train.epochs=-1'], ['train.epochs -1.0 must be above 0 and finite']),
    (['--config.train.epochs=0.1', '--config.train.warmup_epochs=0.5'],
     ['train.warmup_epochs 0.5', 'all of the 1 steps']),
    (['--config.train.epochs=nan'], ['train.epochs nan']),
    (['--config.train.epochs=inf'], ['train.epochs inf']),
    (['--config.train.batch_size=97'], ['train.batch_size is 97', '96 images']),
    (['--config.train.batch_size=0'], ['train.batch_size 0']),
    (['--config.train.batch_size=-8'], ['train.batch_size -8']),
    (['--config.train.batch_size=12'], ['train.batch_size 12', '8 devices', 'multiple of 8']),
    (['--config.train.accumulation=0'], ['train.accumulation 0']),
    (['--config.train.accumulation=3'], ['train.accumulation 3', 'not a multiple']),
    (['--config.train.accumulation=4'], ['train.batch_size 16 is not divisible', '8 devices times 4 parts', 'multiple of 32']),
    (['--config.train.noise=pink'], ["train.noise 'pink'", 'gaussian, uniform, levels']),
    (['--config.train.noise=levels'], ["train.noise 'levels'", 'model.noise_conditioned False']),
    (['--config.model.noise_conditioned=True'],
     ["train.noise 'gaussian'", 'model.noise_conditioned True']),
    (['--config.train.levels=few'], ["train.levels 'few'", 'uniform, uniform_square']),
    (['--config.train.weight=heavy'], ["train.weight 'heavy'", 'one, level']),
    (['--config.train.noise=levels', '--config.model.noise_conditioned=True',
      '--config.train.lowest_noise_std=0.1'], ['train.lowest_noise_std 0.1', 'below noise_std 0.1']),
    (['--config.train.noise_std=1'], ['train.noise_std 1.0']),
    (['--config.train.label_dropout=2'], ['train.label_dropout 2.0']),
    (['--config.train.ema_decay=1'], ['train.ema_decay 1.0']),
    (['--config.train.clip_norm=-1'], ['train.clip_norm -1.0']),
    (['--config.train.weight_decay=nan'], ['train.weight_decay nan must be at least 0 and finite']),
    (['--config.train.b1=1.5'], ['train.b1 1.5 must be at least 0 and below 1']),
    (['--config.data.workers=-1'], ['data.workers -1 must be at least 0']),
    (['--config.model.image_size=large'], ['model.image_size large must be a whole number']),
    (['--config.train.log_every=0'], ['train.log_every 0']),
    (['--config.train.checkpoint_every=0'], ['train.checkpoint_every 0']),
    (['--config.train.validate_every=-1'], ['train.validate_every -1']),
    (['--config.train.validation_images=0'], ['train.validation_images 0']),
    (['--step=12'], ['--step=12 has no meaning with --mode=train; leave it out.']),
    (['--mode=sample', '--step=last'], ["--step=last must be the number of a step, or 'best'."]),
    # Sampling and evaluation.
    (['--config.sample.label=12'], ['sample.label 12', '0..4']),
    (['--config.sample.count=0'], ['sample.count 0']),
    (['--config.sample.denoise_solver=euler'], ["sample.denoise_solver 'euler'", 'ode, sde']),
    (['--config.sample.denoise_steps=-1'], ['sample.denoise_steps -1']),
    (['--config.sample.batch_size=0'], ['sample.batch_size 0']),
    (['--config.sample.denoise_precision=low'], ["sample.denoise_precision 'low' must be one of high"]),
    (['--config.sample.method=jacobi'], ["sample.method 'jacobi' must be one of sequential, auto"]),
    (['--config.sample.tolerance=0.0'], ['sample.tolerance 0.0 must be above 0']),
    (['--config.sample.format=png'], ["sample.format 'png'", 'npz']),
    (['--config.evaluate.metrics=("fid",)'], ["'fid'", 'bits_per_dim, classification']),
    (['--config.evaluate.batch_size=0'], ['evaluate.batch_size 0']),
    (['--config.evaluate.metrics=("levels",)'],
     ['evaluate.metrics levels', 'model.noise_conditioned=True', 'leave it out']),
    (['--config.train.noise=levels', '--config.model.noise_conditioned=True',
      '--config.evaluate.levels=(0.05,0.5)'],
     ['evaluate.levels (0.05, 0.5)', 'train.lowest_noise_std 0.01 to train.noise_std 0.1']),
    (['--config.evaluate.draws=0'], ['evaluate.draws 0']),
    (['--config.report.rows=0'], ['report.rows 0 must be at least 1']),
    (['--config.report.guidance_weights=(1.0,-2.0)'],
     ['report.guidance_weights (1.0, -2.0)', 'must hold numbers, each at least 0']),
    (['--config.model.num_classes=0', '--config.guidance.weight=1'],
     ['guidance.weight 1.0', 'class labels', 'temperature']),
    (['--config.model.num_classes=0', '--config.evaluate.metrics=("classification",)'],
     ['classification', 'model.num_classes is 0']),
    (['--config.guidance.weight=-1'], ['guidance.weight -1.0']),
    (['--config.guidance.temperature=0'], ['guidance.temperature 0.0']),
    (['--config.guidance.rule=cubic'], ["guidance.rule 'cubic'"]),
    (['--config.guidance.target=x'], ["guidance.target 'x'"]),
    (['--config.guidance.blocks=0'], ['guidance.blocks 0 ']),
    # Data.
    (['--config.model.num_classes=3'], ['label 3', 'model.num_classes = 3', 'the train set']),
    (['--config.model.image_channels=3'], ['[16, 16, 1]', 'model.image_channels = 3']),
    (['--config.model.image_size=32'], ['[16, 16, 1]', 'model.image_size = 32']),
    (['--config.data.source=mnist'], ["data.source is 'mnist'", 'embedded, idx, prepared, tfds']),
    (['--config.data.path=/nonexistent'], ['train-images-idx3-ubyte', '/nonexistent', 'data.path']),
    (['--config.data.path='], ['data.path is empty']),
    (['--config.data.test_split=validation'], ["'validation'"]),
], ids=lambda x: x[0] if x and x[0].startswith('-') else '')
def test_bad_input(refused, images, tmp_path, given, words):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
    before = files(tmp_path)
    fields = flags(tmp_path, images)
    if given[0].startswith('--config='):
        fields = [f'--workdir={tmp_path}']
    refused([*fields, *given], *words)
    assert files(tmp_path) == before


@pytest.mark.parametrize('earlier', [
    ['--config.model.layers_per_block=(1,1)'], ['--config.model.layers_per_block', '(1,1)'],
    ['-config.model.layers_per_block=7', '--config.model.layers_per_block=8'],
])
@pytest.mark.parametrize('last', [
    ['--config.model.layers_per_block=(3,3)'], ['--config.model.layers_per_block', '(3,3)']
])
def test_last_value_of_a_field_wins(earlier, last):
    given = ['main', QUICKSTART, *earlier, '--config.seed=4', '--workdir=x', '--config.seed=5',
             '--config.evaluate.levels=(0.1,)', *last, '--mode=sample']
    parsed = main._parse(given)
    assert parsed.config.model.layers_per_block == (3, 3)
    assert parsed.config.evaluate.levels == (0.1,)
    assert parsed.config.seed == 5 and parsed.workdir == 'x' and parsed.mode == 'sample'


@pytest.mark.parametrize('config', [[QUICKSTART], QUICKSTART.split('=')])
def test_fields_before_their_config(config):
    given = main._parse(['main', '--config.seed=3', '--workdir=x', *config, '--config.model.width=8'])
    assert (given.config.seed, given.config.model.width, given.workdir) == (3, 8, 'x')


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    shutil.copy(ROOT / 'configs' / 'fashion_mnist.py', tmp_path / 'mine.py')
    given = main._parse(['main', '--config=~/mine.py', '--workdir=~/x'])
    config_paths.resolve(given.config, given)
    assert (given.config.train.batch_size, given.workdir) == (64, f'{tmp_path}/x')


def test_missing_flags(refused):
    refused(['--workdir=x'], '--config is missing, and --workdir=x has no checkpoint;')
    refused([], '--config is missing; pass')
    refused([QUICKSTART], '--workdir is missing')


def test_help(capfd):
    assert call('--help') == 0
    out = capfd.readouterr().out
    for word in ('--workdir', '--config', f'--mode:<{"|".join(commands.MODES)}>'):
        assert word in ''.join(out.split())  # lines are folded
    lines = out.partition('\nModes:\n')[2].splitlines()
    assert [line.split()[0] for line in lines[: len(commands.MODES)]] == list(commands.MODES)
    assert all(len(line) <= 100 for line in lines[: len(commands.MODES)])


def test_imagenet_without_its_data(refused, tmp_path):
    refused(
        [f'--config={ROOT}/configs/imagenet64.py', f'--workdir={tmp_path}/run',
         f'--config.data.path={tmp_path}'],
        f'{tmp_path} has no manifest.json', f'tarflow_jax.data.prepare SOURCE --out={tmp_path}',
    )
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name, damage', [
    ('train-images-idx3-ubyte', 'is truncated'), ('t10k-labels-idx1-ubyte', 'is truncated')
])
def test_damaged_data_file_is_named(refused, images, tmp_path, name, damage):
    folder = shutil.copytree(images, tmp_path / 'images')
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    refused(flags(tmp_path / 'run', folder), folder / name, damage)


@pytest.mark.parametrize('mode', ['train', 'sample', 'evaluate'])
def test_workdir_of_another_model(refused, trained, images, mode):
    before = files(trained)
    refused(
        [*flags(trained, images, model__width=64), f'--mode={mode}'],
        f'{trained}/checkpoints holds a checkpoint of another model',
        'model.width is 32 there and 64 in this config',
    )
    assert files(trained) == before


def test_average_cannot_be_dropped_on_the_way(refused, trained, images):
    refused(flags(trained, images, train__ema_decay=0.0), 'train.ema_decay 0.9', 'config has 0.0')


def test_damaged_checkpoints(trained, images, tmp_path, capfd, monkeypatch):
    workdir = shutil.copytree(trained, tmp_path / 'run')

    def empty(step):
        shutil.rmtree(workdir / 'checkpoints' / step / 'weights')
        (workdir / 'checkpoints' / step / 'weights').mkdir()

    monkeypatch.setattr(checkpoint, 'AGAIN_AFTER', 0)
    empty('12')
    assert call(*flags(workdir, images), '--mode=sample') == 0
    said = capfd.readouterr().err
    assert f'{workdir}/checkpoints/12 is damaged or cannot be read (' in said
    assert '; using the one at step 9' in said and 'samples of step 9 of' in said
    empty('9')
    monkeypatch.setattr(main.os, '_exit', sys.exit)
    for mode in ('sample', 'train'):  # of 2, supervise.sh makes no second try
        code = 0
        try:
            code = call(*flags(workdir, images), f'--mode={mode}')
        except SystemExit as ended:
            code = ended.code
        assert code == 2
        last = capfd.readouterr().err.splitlines()[-1]  # Orbax has its say before
        assert f'{workdir}/checkpoints/9 is damaged or cannot be read (' in last
        assert last.endswith(f'or delete {workdir}/checkpoints to start over.')
    assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['12', '9']


@pytest.mark.parametrize('mode', ['sample', 'evaluate'])
def test_workdir_without_a_checkpoint(refused, images, tmp_path, mode):
    refused(
        [*flags(tmp_path / 'run', images), f'--mode={mode}'],
        f'{tmp_path}/run/checkpoints holds no checkpoint', 'train first',
    )
    assert not (tmp_path / 'run').exists()


def test_workdir_that_another_run_writes_to(refused, trained, images):
    with lock.held(trained):
        before = files(trained)
        refused(flags(trained, images), f'is writing to {trained}; wait for it')
        assert files(trained) == before
        assert call(*flags(trained, images), '--mode=evaluate') == 0


@pytest.mark.parametrize('below', ['', '/run'])
def test_workdir_that_is_a_file(refused, images, tmp_path, below):
    (tmp_path / 'file').write_text('mine')
    refused(flags(f'{tmp_path}/file{below}', images), f'{tmp_path}/file is ', 'not a folder')
    assert (tmp_path / 'file').read_text() == 'mine'


def test_workdir_that_cannot_be_written(refused, images, tmp_path, monkeypatch):
    # Not by permissions: they mean nothing to root, as whom tests often run in containers.
    monkeypatch.setattr(os, 'access', lambda path, mode: path != tmp_path)
    refused(flags(tmp_path / 'run', images), f'{tmp_path} is not writable')


@pytest.mark.parametrize('mode', ['sample', 'evaluate', 'convert'])
def test_input_that_is_no_checkpoint(refused, images, tmp_path, mode):
    text = tmp_path / 'text.pth'
    text.write_text('not a checkpoint')
    common = [*flags(tmp_path / 'run', images), f'--mode={mode}']
    refused([*common, f'--input={text}'], text)
    refused([*common, f'--input={tmp_path}/nosuch.pth'], f'{tmp_path}/nosuch.pth does not exist')
    refused([*common, f'--input={tmp_path}'], f'{tmp_path} is a folder, not a file')
    refused([*common, f'--input={tmp_path}/text'], f'{tmp_path}/text')
    # A real one, of another model.
    refused([*common, f'--input={OFFICIAL}'], OFFICIAL, 'does not fit')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('mode', ['sample', 'evaluate', 'report'])
def test_checkpoint_that_is_not_finite(converted, images, tmp_path, capfd, mode):
    workdir = shutil.copytree(converted, tmp_path / 'run')
    model = Case('cond_gray').model
    with Checkpoints(workdir, model, {}) as checkpoints:
        state = abstract_state(model, adamw(lambda k: 0.1), ema=False)
        state = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), state)
        params = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), state.params)
        checkpoints.save(state._replace(params=params))
    assert call(*flags(workdir, images, **COND_GRAY), f'--mode={mode}') == 2
    assert f'{workdir}/checkpoints/1 has parameters that are not finite' in capfd.readouterr().err


LEVELS = {'model__noise_conditioned': True, 'train__noise': 'levels'}


@pytest.mark.parametrize('mode', ['sample', 'evaluate', 'convert'])
def test_input_of_the_other_kind_of_flow(refused, images, tmp_path, mode):
    theirs = FOLDER / 'itarflow_uncond_gray' / 'model.pth'
    for path, fields, says in (
        (OFFICIAL, LEVELS, 'has a TarFlow, but the model has noise_conditioned True'),
        (theirs, {}, 'has an iTARFlow, but the model has noise_conditioned False'),
    ):
        given = flags(tmp_path / 'run', images, **fields)
        refused([*given, f'--mode={mode}', f'--input={path}'], f'{path} {says}', 'train.noise')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('mode', ['train', 'sample', 'report'])
def test_workdir_of_the_other_kind_of_flow(refused, trained, images, mode):
    refused(
        [*flags(trained, images, **LEVELS), f'--mode={mode}'],
        'model.noise_conditioned is False there and True in this config', 'choose another --workdir',
    )


def test_convert_wants_to_know_what(refused, trained, images, tmp_path):
    common = [*flags(trained, images), '--mode=convert']
    refused(common, '--input=FILE', '--output=FILE.safetensors')
    refused([*common, '--output=x.pth'], 'x.pth must end with .safetensors')
    refused([*common, f'--output={tmp_path}/no/x.safetensors'], f'{tmp_path}/no', 'does not exist')


def test_convert_does_not_overwrite_a_run(refused, converted, images):
    before = files(converted)
    refused(
        [*flags(converted, images, **COND_GRAY), '--mode=convert', f'--input={OFFICIAL}'],
        f'{converted} already has a checkpoint at step 0', 'empty --workdir',
    )
    assert files(converted) == before


# A failed run.


def test_no_room_for_metrics(trained, images, tmp_path, monkeypatch, capfd):
    def full(self, step, scalars):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(MetricWriter, 'write_scalars', full)
    workdir = shutil.copytree(trained, tmp_path / 'run')
    shutil.rmtree(workdir / 'checkpoints' / '12')
    assert call(*flags(workdir, images)) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.endswith('error: [Errno 28] No space left on device')


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from tarflow_jax.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_disk_that_fills_up_during_a_checkpoint(trained, images, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    longer = dict(train__epochs=3.0)
    # No file may grow beyond 20 kB: metrics do not, the arrays of a checkpoint do.
    process = start('20000', *flags(workdir, images, **longer), program=('-c', LIMITED))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    last = output.splitlines()[-1]
    assert f'error: a checkpoint could not be written to {workdir}/checkpoints: ' in last
    assert 'File too large' in last and 'the one at step 12 is intact' in last
    assert saved(workdir, 12) == saved(trained, 12)
    # With room again, the same command ends as if nothing had happened.
    wanted = shutil.copytree(trained, tmp_path / 'wanted')
    for folder in (workdir, wanted):
        assert call(*flags(folder, images, **longer)) == 0
    assert saved(workdir, 18) == saved(wanted, 18)
    assert metrics(workdir) == metrics(wanted)
