"""The command line: what users get wrong, and what the modes leave behind."""

import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy
from command_line import (
    QUICKSTART,
    ROOT,
    call,
    compilations,
    files,
    flags,
    metrics,
    saved,
    start,
    write_images,
)
from parity_cases import FOLDER, Case

from tarflow_jax import commands
from tarflow_jax import config as configs
from tarflow_jax import convert as official
from tarflow_jax.data import pipeline, sources
from tarflow_jax.evaluation import bits_per_dim, bulk, sample_files, sample_parts
from tarflow_jax.flow.likelihood import training_loss
from tarflow_jax.torch_file import read_torch_file
from tarflow_jax.training import loop
from tarflow_jax.training.metrics import MetricWriter
from tarflow_jax.training.step import Recipe, add_noise

OFFICIAL = FOLDER / 'cond_gray' / 'model.pth'
# The fields of that checkpoint's model, beside what `flags` has in common with it.
COND_GRAY = dict(
    model__patch_size=4, model__width=64, model__head_dim=64, model__layers_per_block='(1,1,1)'
)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    """A workdir with checkpoints at steps 9 and 12. Tests that write take a copy."""
    workdir = tmp_path_factory.mktemp('trained')
    assert call(*flags(workdir, images)) == 0
    return workdir


@pytest.fixture(scope='module')
def converted(images, tmp_path_factory):
    """A workdir made from an official checkpoint."""
    workdir = tmp_path_factory.mktemp('converted')
    code = call(*flags(workdir, images, **COND_GRAY), '--mode=convert', f'--input={OFFICIAL}')
    assert code == 0
    return workdir


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


# Bad input.


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
    (['--config=configs/nosuch.py'], ['--config=configs/nosuch.py: there is no such file',
                                      'there are', 'fashion_mnist.py', 'imagenet64.py']),
    (['--config=configs/imagnet64.py:cond'], ['no such file; did you mean', 'configs/imagenet64.py?']),
    (['--config=fashion_mnist'], ['no such file; did you mean', 'configs/fashion_mnist.py?']),
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
    (['--mode=test'], ['--mode=test', 'train|sample|evaluate|report|convert']),
    (['--mode=smaple'], ['--mode=smaple', "did you mean 'sample'?"]),
    (['--distributed=onn'], ['--distributed=onn', "did you mean 'on'?"]),
    (['train'], ["'train' is not a flag"]),
    (['--workdir='], ['--workdir is missing']),
    (['--input=x.pth'], ['--input=x.pth has no meaning with --mode=train']),
    (['--output=x.safetensors'], ['--output=x.safetensors has no meaning with --mode=train']),
    (['--mode=report'], ['holds no checkpoint']),
    (['--mode=report', '--input=x.pth'], ['--input=x.pth has no meaning with --mode=report']),
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
    # Training.
    (['--config.seed=-1'], ['seed -1']),
    (['--config.seed=4294967296'], ['seed 4294967296']),
    (['--config.train.epochs=0'], ['0 training steps', 'train.epochs']),
    (['--config.train.epochs=-1'], ['train.epochs']),
    (['--config.train.epochs=nan'], ['train.epochs nan']),
    (['--config.train.epochs=inf'], ['train.epochs inf']),
    (['--config.train.batch_size=97'], ['train.batch_size is 97', '96 images']),
    (['--config.train.batch_size=0'], ['train.batch_size is 0']),
    (['--config.train.batch_size=-8'], ['train.batch_size is -8']),
    (['--config.train.batch_size=12'], ['train.batch_size 12', '8 devices', 'multiple of 8']),
    (['--config.train.accumulation=0'], ['train.accumulation 0']),
    (['--config.train.accumulation=3'], ['train.accumulation 3', 'not a multiple']),
    (['--config.train.accumulation=4'], ['train.batch_size 16 cannot be shared', '8 devices in 4 parts', 'multiple of 32']),
    (['--config.train.noise=pink'], ["train.noise 'pink'", 'gaussian, uniform']),
    (['--config.train.noise_std=1'], ['train.noise_std 1.0']),
    (['--config.train.label_dropout=2'], ['train.label_dropout 2.0']),
    (['--config.train.ema_decay=1'], ['train.ema_decay 1.0']),
    (['--config.train.clip_norm=-1'], ['train.clip_norm -1.0']),
    (['--config.train.log_every=0'], ['train.log_every 0']),
    (['--config.train.checkpoint_every=0'], ['train.checkpoint_every 0']),
    # Sampling and evaluation.
    (['--config.sample.label=12'], ['sample.label 12', '0..4']),
    (['--config.sample.count=0'], ['sample.count 0']),
    (['--config.sample.batch_size=0'], ['sample.batch_size 0']),
    (['--config.sample.method=jacobi'], ["sample.method 'jacobi' is none of sequential, auto"]),
    (['--config.sample.tolerance=0.0'], ['sample.tolerance 0.0 must be above 0']),
    (['--config.sample.format=png'], ["sample.format 'png'", 'npz']),
    (['--config.evaluate.metrics=("fid",)'], ["'fid'", 'bits_per_dim, classification']),
    (['--config.evaluate.batch_size=0'], ['evaluate.batch_size 0']),
    (['--config.evaluate.draws=0'], ['evaluate.draws 0']),
    (['--config.report.rows=0'], ['report.rows 0 must be at least 1']),
    (['--config.report.guidance_weights=(1.0,-2.0)'],
     ['report.guidance_weights (1.0, -2.0)', 'from 0 up']),
    (['--config.model.num_classes=0', '--config.guidance.weight=1'],
     ['guidance weight 1.0', 'guidance.temperature', 'class']),
    (['--config.model.num_classes=0', '--config.evaluate.metrics=("classification",)'],
     ['classification', 'model.num_classes 0']),
    (['--config.guidance.weight=-1'], ['guidance weight -1.0']),
    (['--config.guidance.temperature=0'], ['guidance temperature 0.0']),
    (['--config.guidance.rule=cubic'], ["guidance rule 'cubic'"]),
    (['--config.guidance.target=x'], ["guidance target 'x'"]),
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
    # A flag given twice would be taken together where it is a list.
    names = {flag.partition('=')[0] for flag in given}
    fields = [f for f in flags(tmp_path, images) if f.partition('=')[0] not in names]
    if given[0].startswith('--config='):
        fields = [f'--workdir={tmp_path}']
    refused([*fields, *given], *words)
    assert files(tmp_path) == before


def test_missing_flags(refused):
    refused(['--workdir=x'], '--config is missing')
    refused([QUICKSTART], '--workdir is missing')


def test_help(capfd):
    assert call('--help') == 0
    out = capfd.readouterr().out
    for word in ('--workdir', '--config', '--mode: <train|sample|evaluate|report|convert|compile>'):
        assert word in out
    lines = out.partition('\nModes:\n')[2].splitlines()
    assert [line.split()[0] for line in lines[:6]] == list(commands.MODES)
    assert all(len(line) <= 100 for line in lines[:6])


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


def test_damaged_checkpoint_is_named(trained, images, tmp_path, capfd):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    shutil.rmtree(workdir / 'checkpoints' / '12' / 'weights')
    (workdir / 'checkpoints' / '12' / 'weights').mkdir()
    for mode in ('sample', 'evaluate'):
        assert call(*flags(workdir, images), f'--mode={mode}') == 2
        last = capfd.readouterr().err.splitlines()[-1]  # Orbax has its say before
        assert f'{workdir}/checkpoints/12 cannot be read' in last
        assert 'to go on from the one before it.' in last
    shutil.rmtree(workdir / 'checkpoints' / '12')
    assert call(*flags(workdir, images), '--mode=sample') == 0
    assert 'samples of step 9 of' in capfd.readouterr().err


@pytest.mark.parametrize('mode', ['sample', 'evaluate'])
def test_workdir_without_a_checkpoint(refused, images, tmp_path, mode):
    refused(
        [*flags(tmp_path / 'run', images), f'--mode={mode}'],
        f'{tmp_path}/run/checkpoints holds no checkpoint', 'train first',
    )
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('below', ['', '/run'])
def test_workdir_that_is_a_file(refused, images, tmp_path, below):
    (tmp_path / 'file').write_text('mine')
    refused(flags(f'{tmp_path}/file{below}', images), f'{tmp_path}/file is not a folder')
    assert (tmp_path / 'file').read_text() == 'mine'


def test_workdir_that_cannot_be_written(refused, images, tmp_path, monkeypatch):
    # Not by permissions: they mean nothing to root, as whom tests often run in containers.
    monkeypatch.setattr(os, 'access', lambda path, mode: path != tmp_path)
    refused(flags(tmp_path / 'run', images), f'{tmp_path} cannot be written to')


@pytest.mark.parametrize('mode', ['sample', 'evaluate', 'convert'])
def test_input_that_is_no_checkpoint(refused, images, tmp_path, mode):
    text = tmp_path / 'text.pth'
    text.write_text('not a checkpoint')
    common = [*flags(tmp_path / 'run', images), f'--mode={mode}']
    refused([*common, f'--input={text}'], text)
    refused([*common, f'--input={tmp_path}/nosuch.pth'], f'{tmp_path}/nosuch.pth does not exist')
    refused([*common, f'--input={tmp_path}'], f'{tmp_path} is not a file')
    refused([*common, f'--input={tmp_path}/text'], f'{tmp_path}/text')
    # A real one, of another model.
    refused([*common, f'--input={OFFICIAL}'], OFFICIAL, 'does not fit')
    assert not (tmp_path / 'run').exists()


def test_convert_wants_to_know_what(refused, trained, images, tmp_path):
    common = [*flags(trained, images), '--mode=convert']
    refused(common, '--input=FILE', '--output=FILE.safetensors')
    refused([*common, '--output=x.pth'], '--output x.pth must end with .safetensors')
    refused([*common, f'--output={tmp_path}/no/x.safetensors'], f'{tmp_path}/no', 'does not exist')


def test_convert_does_not_overwrite_a_run(refused, converted, images):
    before = files(converted)
    refused(
        [*flags(converted, images, **COND_GRAY), '--mode=convert', f'--input={OFFICIAL}'],
        f'{converted} already holds a checkpoint at step 0', 'empty --workdir',
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


# The modes.


def samples_in(workdir):
    """The folders of samples that a workdir holds, by name."""
    return sorted(path for path in (workdir / 'samples').iterdir() if path.is_dir())


def test_sample(trained, images, tmp_path, capfd):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    assert call(*flags(workdir, images), '--mode=sample') == 0
    [folder] = samples_in(workdir)
    assert re.fullmatch('step_0000012-[0-9a-f]{8}', folder.name)
    assert f'13 samples of step 12 of {workdir} (13 drawn now' in capfd.readouterr().err
    arrays = np.load(folder / 'samples.npz')
    assert arrays['arr_0'].shape == (13, 16, 16, 1) and arrays['arr_0'].dtype == np.uint8
    np.testing.assert_array_equal(arrays['arr_1'], np.arange(13) % 5)
    about = json.loads((folder / 'samples.json').read_text())
    assert about['fingerprint']['denoise'] == {'noise_std': 0.1, 'strength': 1.0}
    assert str(tmp_path) not in json.dumps(about)

    # Again there is nothing to draw; then a longer set, whose first images are the same.
    assert call(*flags(workdir, images), '--mode=sample') == 0
    assert '(0 drawn now' in capfd.readouterr().err
    assert call(*flags(workdir, images, sample__count=17), '--mode=sample') == 0
    assert '(4 drawn now' in capfd.readouterr().err
    assert samples_in(workdir) == [folder]
    longer = np.load(folder / 'samples.npz')
    assert len(longer['arr_0']) == 17
    np.testing.assert_array_equal(longer['arr_0'][:13], arrays['arr_0'])

    # Other samples go elsewhere.
    assert call(*flags(workdir, images, sample__label=3, sample__count=3), '--mode=sample') == 0
    [other] = set(samples_in(workdir)) - {folder}
    assert np.load(other / 'samples.npz')['arr_1'].tolist() == [3, 3, 3]


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_sampling_stops_and_goes_on(trained, images, tmp_path, monkeypatch, capfd, number, code):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    command = [*flags(workdir, images, sample__format='array_record'), '--mode=sample']
    write = sample_parts.write

    def stop(*arguments):
        signal.raise_signal(number)
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sample_parts, 'write', stop)
        assert call(*command) == code
    [folder] = samples_in(workdir)
    last = capfd.readouterr().err.splitlines()[-1]
    assert f'stopped; the 8 images drawn so far are kept in {folder} and the same' in last
    assert call(*command) == 0
    assert '(5 drawn now' in capfd.readouterr().err
    assert len(sample_files.open_samples(folder)) == 13


def test_evaluate(trained, images, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    both = dict(evaluate__metrics='("bits_per_dim","classification")')
    assert call(*flags(workdir, images, **both), '--mode=evaluate') == 0
    report = json.loads((workdir / 'evaluation.json').read_text())
    assert report['checkpoint'] == {'name': f'step 12 of {workdir}', 'step': 12}
    bits, classes = report['scores']['bits_per_dim'], report['scores']['classification']
    assert bits['images'] == classes['images'] == 20
    # Pixels without structure, a flow near the identity: a little above the 8 bits they have.
    assert 8.0 < bits['bits_per_dim'] < 9.0
    assert 20 * classes['accuracy'] == pytest.approx(round(20 * classes['accuracy']))
    assert not list(workdir.glob('*.tmp'))


def announced(printed, mode):
    """What a mode says that it is about to do, as {name: value}; one screen at most."""
    block = re.search(rf'^\d\d:\d\d:\d\d {mode}\n((  \w+ .*\n)+)', printed, re.MULTILINE)[1]
    lines = block.splitlines()
    assert len(lines) < 12
    return dict(line.split(maxsplit=1) for line in lines)


def test_modes_say_what_they_are_about_to_do(trained, images, tmp_path, capfd):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    scores = dict(evaluate__metrics='("bits_per_dim",)')
    output = tmp_path / 'out.safetensors'
    found, ends = {}, {}
    for mode, more in (
        ('train', ()), ('sample', ()), ('evaluate', ()), ('convert', (f'--output={output}',))
    ):
        assert call(*flags(workdir, images, **scores), f'--mode={mode}', *more) == 0
        printed = capfd.readouterr().err
        found[mode], ends[mode] = announced(printed, mode), printed.splitlines()[-1]
    saved_tensors = safetensors.numpy.load_file(output)
    count = sum(t.size for name, t in saved_tensors.items() if 'mask' not in name and name != 'var')
    for lines in found.values():
        assert lines['flow'] == f'8-32-1-1 at 16x16x1, {count:,} parameters, float32'
        assert lines['devices'].startswith('8 x cpu of 1 process(es) as data 8, fsdp 1')
    assert lines['checkpoint'] == f'step 12 of {workdir}' and lines['output'] == str(output)
    assert '96 images' in found['train']['data'] and '20 images' in found['train']['data']
    assert found['train']['steps'] == '12 of 16 images (2 epochs), going on after step 12'
    assert found['sample']['samples'].startswith('13 in batches of 8, all classes in turn')
    assert found['evaluate']['scores'] == 'bits_per_dim'
    for mode, place in (
        ('train', workdir), ('sample', workdir / 'samples'),
        ('evaluate', workdir / 'evaluation.json'), ('convert', output),
    ):
        assert str(place) in found[mode]['output'] and str(place) in ends[mode]


def press_ctrl_c(*_, **__):
    # Twice: training and sampling note the first and finish what they are at.
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize('mode, where, name, says', [
    ('train', loop, 'jitted_train_step', 'goes on from the newest'),
    ('sample', bulk, '_noise', 'goes on from there'),
    ('evaluate', bits_per_dim, 'over_set', 'starts the scores again'),
    ('convert', official, '_rearrange', 'starts again'),
    ('evaluate', configs, 'source', 'stopped before anything was done'),
])
def test_ctrl_c(trained, images, tmp_path, monkeypatch, capfd, mode, where, name, says):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    output = tmp_path / 'out.safetensors'
    fields = dict(evaluate__metrics='("bits_per_dim",)', train__epochs=2.1)
    command = [*flags(workdir, images, **fields), f'--mode={mode}']
    command += [f'--output={output}'] * (mode == 'convert')
    with monkeypatch.context() as patch:
        patch.setattr(where, name, press_ctrl_c)
        assert call(*command) == 130
    printed = capfd.readouterr().err
    assert 'Traceback' not in printed
    assert says in printed.splitlines()[-1]
    assert not output.exists() and not list(tmp_path.glob('.out*'))
    scores = 'evaluation.json'
    assert (workdir / scores).read_bytes() == (trained / scores).read_bytes()
    assert call(*command) == 0


def test_converted_checkpoint_samples_and_scores_as_the_official_one(converted, images, tmp_path):
    fields = dict(**COND_GRAY, evaluate__metrics='("bits_per_dim",)')
    found = {}
    for name, workdir, source in (
        ('workdir', converted, []),
        ('file', tmp_path, [f'--input={OFFICIAL}']),
    ):
        for mode in ('sample', 'evaluate'):
            assert call(*flags(workdir, images, **fields), f'--mode={mode}', *source) == 0
        scores = json.loads((workdir / 'evaluation.json').read_text())['scores']
        [folder] = samples_in(workdir)
        assert folder.name.startswith('step_0000000-' if name == 'workdir' else 'model-')
        found[name] = np.load(folder / 'samples.npz')['arr_0'], scores
    np.testing.assert_array_equal(found['workdir'][0], found['file'][0])
    assert found['workdir'][1] == found['file'][1]


@pytest.mark.parametrize('source', ['workdir', 'input'])
def test_official_tensors_come_back(converted, images, tmp_path, source):
    output = tmp_path / 'out.safetensors'
    given = [f'--input={OFFICIAL}'] if source == 'input' else []
    code = call(
        *flags(converted if source == 'workdir' else '', images, **COND_GRAY), '--mode=convert',
        f'--output={output}', *given,
    )
    assert code == 0
    wanted, found = read_torch_file(OFFICIAL), safetensors.numpy.load_file(output)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.slow
def test_training_goes_on_from_a_converted_workdir(converted, images, tmp_path):
    workdir = shutil.copytree(converted, tmp_path / 'run')
    fields = dict(COND_GRAY, train__epochs=0.334, train__warmup_epochs=0.0, train__sample_every=1)
    assert call(*flags(workdir, images, **fields)) == 0
    assert [line['step'] for line in metrics(workdir) if 'loss' in line] == [1, 2]
    # The first loss is that of the official flow: the same batch, scored by hand.
    source = sources.idx_folder(images, 'train')
    batch = next(pipeline.train_batches(source, batch_size=16, seed=0))
    step_key = jax.random.split(jax.random.key(0), 3)[1]
    noise_key, label_key = jax.random.split(jax.random.fold_in(step_key, 0))
    dropped = jax.random.bernoulli(label_key, 0.3, (16,))
    case = Case('cond_gray')
    noisy = add_noise(noise_key, batch['image'], Recipe(noise_std=0.1))
    z, logdet = case.model.apply(case.variables, noisy, np.where(dropped, -1, batch['label']))
    assert metrics(workdir)[0]['loss'] == pytest.approx(
        float(training_loss(z, logdet)[0]), rel=1e-5, abs=1e-6
    )
    steps = sorted(path.name for path in (workdir / 'checkpoints').iterdir())
    assert steps == ['0', '2']


def test_module_runs(tmp_path):
    process = start('--mode=sample', f'--workdir={tmp_path}', QUICKSTART, cwd=tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output.count('\n') == 1 and 'holds no checkpoint' in output


def test_samples_by_a_schedule(trained, images, tmp_path, capfd):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    auto = flags(workdir, images, sample__method='auto', sample__count=8, sample__batch_size=8)
    assert call(*auto, '--mode=sample') == 0
    printed = capfd.readouterr().err
    assert 'finding the fastest way to draw batches of 8' in printed
    assert 'largest difference to sequential samples' in printed
    [folder] = samples_in(workdir)
    [schedule] = (workdir / 'schedules').iterdir()
    assert schedule.name == f'{folder.name}.json'
    about = json.loads((folder / 'samples.json').read_text())
    assert about['fingerprint']['tolerance'] == 1e-4
    # A longer set goes on by the same schedule, and is what sequential sampling draws.
    longer = flags(workdir, images, sample__method='auto', sample__count=9, sample__batch_size=8)
    before = schedule.read_bytes()
    assert call(*longer, '--mode=sample') == 0
    assert f'drawn by the schedule {schedule}' in capfd.readouterr().err
    assert schedule.read_bytes() == before
    assert call(*flags(workdir, images, sample__count=9), '--mode=sample') == 0
    [sequential] = set(samples_in(workdir)) - {folder}
    found, wanted = (np.load(f / 'samples.npz')['arr_0'].astype(int) for f in (folder, sequential))
    assert np.abs(found - wanted).max() <= 1
