"""The modes of the command line: what they say and what they leave behind."""

import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy
from command_line import COND_GRAY, OFFICIAL, QUICKSTART, call, flags, metrics, start
from parity_cases import Case

from tarflow_jax import config as configs
from tarflow_jax import convert as official
from tarflow_jax import main
from tarflow_jax.data import pipeline, sources
from tarflow_jax.evaluation import bits_per_dim, bulk, sample_files, sample_parts
from tarflow_jax.flow.likelihood import training_loss
from tarflow_jax.torch_file import read_torch_file
from tarflow_jax.training import loop
from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.corruption import Recipe, corrupt


def samples_in(workdir):
    """The folders of samples that a workdir holds, by name."""
    return sorted(path for path in (workdir / 'samples').iterdir() if path.is_dir())


def test_sample(trained, images, tmp_path, capfd):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    assert call(*flags(workdir, images), '--mode=sample') == 0
    [folder] = samples_in(workdir)
    assert re.fullmatch('step_0000012-[0-9a-f]{8}', folder.name)
    assert f'13 samples of step 12 of {workdir} (13 new' in capfd.readouterr().err
    arrays = np.load(folder / 'samples.npz')
    assert arrays['arr_0'].shape == (13, 16, 16, 1) and arrays['arr_0'].dtype == np.uint8
    np.testing.assert_array_equal(arrays['arr_1'], np.arange(13) % 5)
    about = json.loads((folder / 'samples.json').read_text())
    denoise = about['fingerprint']['denoise']
    assert (denoise['noise_std'], denoise['strength'], denoise['levels']) == (0.1, 1.0, [])
    assert str(tmp_path) not in json.dumps(about)

    # Again there is nothing to draw; then a longer set, whose first images are the same.
    assert call(*flags(workdir, images), '--mode=sample') == 0
    assert '(0 new' in capfd.readouterr().err
    assert call(*flags(workdir, images, sample__count=17), '--mode=sample') == 0
    assert '(4 new' in capfd.readouterr().err
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
    assert f'stopped; 8 images are kept in {folder}; run the same command' in last
    assert call(*command) == 0
    assert '(5 new' in capfd.readouterr().err
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
    block = re.search(rf'^\d\d:\d\d:\d\d {mode}\n((  +\S.*\n)+)', printed, re.MULTILINE)[1]
    lines = re.sub(r'\n    +', ' ', block).splitlines()
    # A long path is not broken.
    short = [line for line in block.splitlines() if '/' not in line]
    assert len(lines) < 12 and all(len(line) <= 99 for line in short)
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
    assert found['train']['steps'] == '12 of 16 images (2 epochs), resuming after step 12'
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
    ('train', loop, 'jitted_train_step', 'run the same command again to resume from the newest'),
    ('sample', bulk, 'noise_of_examples', 'run the same command again to resume'),
    ('evaluate', bits_per_dim, 'over_set', 'run the same command again to compute the scores'),
    ('convert', official, '_rearrange', 'run the same command again'),
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


def set_of_classes(folder, names, kind='imagenet_resized'):
    """The fields of a prepared set, of which there is no more than what names its classes."""
    folder.mkdir()
    (folder / 'manifest.json').write_text(json.dumps({
        'format': 1, 'dataset': 'a set', 'tfds_name': 'a_set', 'preprocessing': 'none', 'kind': kind,
        'classes': names, 'image': {'size': 16, 'channels': 1}, 'splits': {},
    }))
    return dict(COND_GRAY, data__source='prepared', data__path=str(folder))


def test_an_official_checkpoint_meets_classes_in_another_order(tmp_path, capfd):
    names = ['n3', 'n1', 'n5', 'n2', 'n4']
    fields, workdir = set_of_classes(tmp_path / 'set', names), tmp_path / 'run'
    given = [*flags(workdir, **fields), '--mode=convert']
    assert call(*given, f'--input={OFFICIAL}') == 0
    assert 'reordered its class tables' in capfd.readouterr().err
    model = configs.plan(main._parse(['main', *given]).config).model
    wanted = official.load_official(OFFICIAL, model)['params']['block_1']['class_embedding']
    with Checkpoints(workdir, model) as checkpoints:
        assert checkpoints.about()['data'] == {'class_names': names, 'kind': 'imagenet_resized'}
        found = checkpoints.restore_variables(lambda tree: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
            ), tree,
        ))['params']['block_1']['class_embedding']
    np.testing.assert_array_equal(found, wanted[[2, 0, 4, 1, 3]])  # n3 is the third by name
    # Out again it has the official order, and says which.
    output = tmp_path / 'out.safetensors'
    assert call(*given, f'--output={output}') == 0
    again = official.load_official(output, model)['params']['block_1']['class_embedding']
    np.testing.assert_array_equal(again, wanted)
    assert official.class_names(output) == sorted(names)


def test_a_set_that_does_not_name_its_classes(tmp_path, capfd):
    fields = set_of_classes(tmp_path / 'set', ['1', '2', '3', '4', '5'])
    for mode in ('convert', 'sample'):
        given = [*flags(tmp_path / 'run', **fields), f'--mode={mode}', f'--input={OFFICIAL}']
        assert call(*given) == 2
        [line] = capfd.readouterr().err.splitlines()
        assert str(OFFICIAL) in line and 'map_clsloc.txt' in line
    assert not (tmp_path / 'run').exists()


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
    noisy = corrupt(noise_key, batch['image'], Recipe(noise_std=0.1)).images
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
    assert 'calibrating the sampling of batches of 8' in printed
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
    assert f'sampling with the schedule {schedule}' in capfd.readouterr().err
    assert schedule.read_bytes() == before
    assert call(*flags(workdir, images, sample__count=9), '--mode=sample') == 0
    [sequential] = set(samples_in(workdir)) - {folder}
    found, wanted = (np.load(f / 'samples.npz')['arr_0'].astype(int) for f in (folder, sequential))
    assert np.abs(found - wanted).max() <= 1
