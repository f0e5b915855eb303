"""Samples in bulk: the same images however they are drawn, and whatever happens on the way."""

import dataclasses
import functools
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from command_line import ROOT, files, with_devices
from PIL import Image
from tiny_flow import tiny
from tiny_plan import plan_of
from tiny_state import random_variables

import tarflow_jax as tfj
from tarflow_jax import files as writing
from tarflow_jax import json_files, lock, paths
from tarflow_jax.evaluation import bulk, sample_files, sample_parts
from tarflow_jax.evaluation.versions import versions
from tarflow_jax.training import pictures, sharding
from tarflow_jax.training.loop import Stopped

MODEL = tiny((1, 1), image_channels=1)
VARIABLES = random_variables(MODEL)
PLAN = plan_of(MODEL, strength=0.5, weight=0.5)
HOW = dict(seed=3)
KNOWN = bulk.fingerprint(PLAN, VARIABLES, 'step_0000012', **HOW)


def test_a_set_is_drawn_by_one_process_and_read_by_many(tmp_path):
    draw(tmp_path, count=8)
    before = files(tmp_path)
    with lock.held(tmp_path):
        assert draw(tmp_path, count=8)['drawn'] == 0
        with pytest.raises(lock.Taken, match=f'process {os.getpid()} on .* is writing to {tmp_path}'):
            draw(tmp_path, count=9)
    assert files(tmp_path) == before


def draw(folder, count=22, batch_size=8, mesh=None, **fields):
    mesh = mesh or sharding.make_mesh()
    plan = PLAN.on(sharding.Layout(mesh))
    variables = jax.device_put(VARIABLES, sharding.shardings(VARIABLES, mesh))
    given = HOW | dict(fingerprint=KNOWN, mesh=mesh) | fields
    return bulk.draw_set(folder, plan, variables, count=count, batch_size=batch_size, **given)


def contents(folder) -> dict:
    return {name: content for name, (_, content) in files(folder).items()}


def pixels(folder) -> np.ndarray:
    return np.load(folder / 'samples.npz')['arr_0']


@pytest.fixture(scope='module')
def wanted(tmp_path_factory):
    """22 images, drawn without anything happening on the way."""
    folder = tmp_path_factory.mktemp('wanted')
    draw(folder)
    return folder


def stop_after(monkeypatch, batches, error):
    """Raises in place of the batch that would come next."""
    left = iter(range(batches))
    original = bulk._draw

    def limited(*arguments):
        if next(left, None) is None:
            raise error
        return original(*arguments)

    monkeypatch.setattr(bulk, '_draw', limited)


def test_what_a_set_is(wanted):
    assert sorted(contents(wanted)) == ['samples.json', 'samples.npz', 'sheet_000000.png']
    arrays = np.load(wanted / 'samples.npz')
    assert arrays.files == ['arr_0', 'arr_1']
    assert arrays['arr_0'].shape == (22, 8, 8, 1) and arrays['arr_0'].dtype == np.uint8
    assert arrays['arr_1'].dtype == np.int64
    np.testing.assert_array_equal(arrays['arr_1'], np.arange(22) % 3)
    assert len({image.tobytes() for image in arrays['arr_0']}) == 22
    about = json.loads((wanted / 'samples.json').read_text())
    assert about['versions'].items() >= {
        'jax': jax.__version__, 'numpy': np.__version__, 'tarflow_jax': tfj.__version__
    }.items()
    seal = about.pop('checksum')
    assert json_files.sealed(about)['checksum'] == seal
    assert about.pop('versions') == versions()
    assert about == {
        'count': 22, 'fingerprint': KNOWN, 'format': 'npz', 'not_finite': 0, 'redrawn': 0,
        'redraws': 0,
    }
    # Ten columns at twice the size, two white pixels between.
    sheet = np.asarray(Image.open(wanted / 'sheet_000000.png'))
    assert sheet.shape == (2 * (3 * 10 - 2), 2 * (10 * 10 - 2))
    np.testing.assert_array_equal(sheet[40:56:2, 20:36:2], arrays['arr_0'][21, :, :, 0])


def test_images_are_those_of_the_sampler(wanted):
    key = jax.random.key(3)
    keys = [jax.random.fold_in(jax.random.fold_in(key, i), 0) for i in range(10, 15)]
    noise = np.stack([jax.random.normal(k, (16, 4)) for k in keys])
    labels = np.arange(10, 15, dtype=np.int32) % 3
    images = tfj.sample(MODEL, VARIABLES, noise, labels, guidance=PLAN.guidance)
    images = tfj.denoise(MODEL, VARIABLES, images, labels, noise_std=0.1, strength=0.5)
    found = pixels(wanted)[10:15].astype(int)
    assert np.abs(found - pictures.to_pixels(images)).max() <= 1


@pytest.mark.parametrize('batch_size, mesh', [
    (22, dict(data=8)), (3, dict(data=2, fsdp=2, tensor=2)), (4, dict(data=1, tensor=2, devices=2)),
], ids=str)
def test_neither_batch_size_nor_mesh_matters(wanted, tmp_path, batch_size, mesh):
    devices = jax.devices()[: mesh.pop('devices', 8)]
    mesh = sharding.make_mesh(**mesh, devices=devices)
    draw(tmp_path, batch_size=batch_size, mesh=mesh)
    difference = np.abs(pixels(tmp_path).astype(int) - pixels(wanted))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    assert contents(tmp_path)['samples.json'] == contents(wanted)['samples.json']


def run(program, *arguments, **environment) -> subprocess.Popen:
    """A program in a process of its own, which can import this file."""
    path = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'tests' / 'evaluation')]
    environment['PYTHONPATH'] = os.pathsep.join([*path, os.environ.get('PYTHONPATH', '')])
    return subprocess.Popen(
        [sys.executable, '-c', program, *map(str, arguments)], env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from bulk_test import draw
sync, calls = os.fsync, []
def fsync(file):
    calls.append(file)
    if len(calls) == 3:  # the third part lies there under its temporary name
        os.kill(os.getpid(), signal.SIGKILL)
    sync(file)
os.fsync = fsync
draw(Path(sys.argv[1]))
"""


def test_killed_and_started_again(wanted, tmp_path):
    killed = run(KILLED, tmp_path)
    output, _ = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, output
    assert sorted(contents(tmp_path)) == [
        'lock', 'parts/00000000.npz', 'parts/00000008.npz',
        f'parts/00000016.npz.{socket.gethostname()}.{killed.pid}.tmp',
    ]
    assert draw(tmp_path)['drawn'] == 6
    assert contents(tmp_path) == contents(wanted)
    assert not (tmp_path / 'parts').exists()
    # Killed when all but the cleaning was done.
    (tmp_path / 'array_record-22.tmp').mkdir()
    (tmp_path / 'samples.npz.host.7.tmp').write_bytes(b'')
    part = dict(pixels=pixels(wanted)[8:16], redraws=np.zeros(8, np.int32), finite=np.ones(8, bool))
    sample_parts.write(tmp_path, 8, part)
    assert draw(tmp_path)['drawn'] == 0
    assert contents(tmp_path) == contents(wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in wanted.iterdir())


TWO = """
import sys
from pathlib import Path
from tarflow_jax.training import processes, sharding
processes.start()
from bulk_test import draw
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
for count, drawn in (8, 8), (22, 14), (22, 0):
    assert draw(Path(sys.argv[1]), count=count, mesh=mesh)['drawn'] == drawn
"""


@pytest.mark.slow
def test_two_processes(wanted, tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    started = [
        run(TWO, tmp_path, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES='2',
            JAX_PROCESS_ID=str(i), XLA_FLAGS=with_devices(4))
        for i in range(2)
    ]
    for process in started:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert np.abs(pixels(tmp_path).astype(int) - pixels(wanted)).max() <= 1
    assert contents(tmp_path)['samples.json'] == contents(wanted)['samples.json']


def test_damaged_part_is_drawn_again(wanted, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        stop_after(patch, 2, OSError(28, 'No space left on device'))
        with pytest.raises(OSError, match='No space'):
            draw(tmp_path)
    part = tmp_path / 'parts' / '00000000.npz'
    damaged = bytearray(part.read_bytes())
    damaged[300] ^= 1  # one bit of one pixel
    part.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert draw(tmp_path)['drawn'] == 22 - 8
    assert f'{part} is damaged' in caplog.text
    assert contents(tmp_path) == contents(wanted)


def test_no_room_for_a_part(wanted, tmp_path, monkeypatch):
    calls, replacing = [], writing.replacing

    def full(path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, 'No space left on device')
        return replacing(path)

    with monkeypatch.context() as patch:
        patch.setattr(writing, 'replacing', full)
        with pytest.raises(OSError, match='No space'):
            draw(tmp_path)
    assert sorted(contents(tmp_path)) == ['parts/00000000.npz', 'parts/00000008.npz']
    draw(tmp_path)
    assert contents(tmp_path) == contents(wanted)


def test_ctrl_c_keeps_what_was_drawn(wanted, tmp_path, monkeypatch, caplog):
    original = bulk._draw

    def press(*arguments):
        signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bulk, '_draw', press)
        with caplog.at_level(logging.WARNING), pytest.raises(Stopped) as stopped:
            draw(tmp_path)
    assert stopped.value.code == 130
    assert f'stopped; 8 images are kept in {tmp_path}; run the same command' in caplog.text
    assert draw(tmp_path)['drawn'] == 14
    assert contents(tmp_path) == contents(wanted)


def test_progress_without_a_terminal(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(bulk, 'LOG_SECONDS', 0)
    with caplog.at_level(logging.INFO):
        draw(tmp_path)
    lines = [record.message for record in caplog.records if '/s, ' in record.message]
    assert [line.partition(',')[0] for line in lines] == [
        '8 of 22 images', '16 of 22 images', '22 of 22 images'
    ]
    assert lines[-1].endswith('/s, 00:00 left')


def test_longer_and_shorter(wanted, tmp_path, monkeypatch):
    first = draw(tmp_path, count=16)
    assert (first['count'], first['drawn'], first['path']) == (16, 16, f'{tmp_path}/samples.npz')
    # On the way to 22 images the run stops, then 16 are wanted again.
    with monkeypatch.context() as patch:
        stop_after(patch, 0, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            draw(tmp_path)
        before = files(tmp_path)
        assert draw(tmp_path, count=5)['drawn'] == 0
        assert files(tmp_path) == before
        assert len(sample_files.open_samples(tmp_path, 5)) == 5
    assert draw(tmp_path)['drawn'] == 6
    assert contents(tmp_path) == contents(wanted)


def test_parts_beyond_the_count_are_kept(wanted, tmp_path, monkeypatch):
    stop_after(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path)
    assert draw(tmp_path, count=12)['drawn'] == 0
    assert sorted(contents(tmp_path)) == [
        'parts/00000008.npz', 'samples.json', 'samples.npz', 'sheet_000000.png'
    ]
    monkeypatch.undo()
    assert draw(tmp_path)['drawn'] == 6
    assert contents(tmp_path) == contents(wanted)


@pytest.mark.parametrize('lost', ['samples.npz', 'samples.json'])
def test_half_of_a_set_is_drawn_again(wanted, tmp_path, lost):
    for name, content in contents(wanted).items():
        (tmp_path / name).write_bytes(content[: len(content) // 2] if name == lost else content)
    assert draw(tmp_path)['drawn'] == 22
    assert contents(tmp_path) == contents(wanted)


def test_array_record(wanted, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    whole, folder = tmp_path / 'whole', tmp_path / 'interrupted'
    assert draw(whole, file_format='array_record')['path'] == f'{whole}/array_record-22'
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            draw(folder, file_format='array_record')
    # Shorter, longer, and again after a shard was damaged.
    assert draw(folder, count=16, file_format='array_record')['drawn'] == 8
    assert draw(folder, file_format='array_record')['drawn'] == 6
    assert contents(folder) == contents(whole)
    [shard] = folder.glob('array_record-22/*-of-00001')
    os.truncate(shard, shard.stat().st_size - 1)
    assert draw(folder, file_format='array_record')['drawn'] == 22
    assert contents(folder) == contents(whole)
    # The same images as in the other format, by our reader and by TFDS; and one from the other.
    assert draw(folder)['drawn'] == 0
    for name in ('samples.npz', 'samples.json', 'sheet_000000.png'):
        assert contents(folder)[name] == contents(wanted)[name]
    ours = sample_files.open_samples(whole, 20)
    builder = tfds.builder_from_directory(whole / 'array_record-22')
    theirs = builder.as_data_source('samples')
    assert (len(ours), len(theirs)) == (20, 22)
    for i, image in enumerate(pixels(wanted)[:20]):
        for found in (ours[i], theirs[i]):
            np.testing.assert_array_equal(found['image'], image)
            assert found['label'] == i % 3


def test_bucket(wanted, bucket):
    assert draw(bucket, count=16)['drawn'] == 16
    assert draw(bucket)['drawn'] == 6
    summary = draw(bucket, file_format='array_record')
    assert (summary['drawn'], summary['path']) == (0, f'{bucket}/array_record-22')
    found = {path.name: path for path in paths.of(bucket).iterdir()}
    assert set(found) == {'array_record-22', 'samples.npz', 'samples.json', 'sheet_000000.png'}
    for name in ('samples.npz', 'sheet_000000.png'):
        assert found[name].read_bytes() == contents(wanted)[name]
    source = sample_files.open_samples(bucket)
    np.testing.assert_array_equal([source[i]['image'] for i in range(22)], pixels(wanted))


def test_images_that_are_not_finite(wanted, tmp_path, monkeypatch):
    # Number 5 twice, and number 20 always; the others of their batches stay as they are.
    sampled, attempts = bulk.generate, []

    def fails(*arguments, **how):
        drawn = sampled(*arguments, **how)
        numbers, attempt = attempts[-1]
        bad = ((numbers == 5) & (attempt < 2)) | (numbers == 20)
        images = jax.numpy.where(bad[:, None, None, None], np.nan, drawn.samples)
        return drawn._replace(samples=images)

    def noise(model, key, numbers, attempt):
        attempts.append((numbers, attempt))
        return original(model, key, numbers, attempt)

    original = bulk.noise_of_examples
    monkeypatch.setattr(bulk, 'generate', fails)
    monkeypatch.setattr(bulk, 'noise_of_examples', noise)
    summary = draw(tmp_path)
    assert (summary['redraws'], summary['redrawn'], summary['not_finite']) == (12, 2, 1)
    found, usual = pixels(tmp_path), pixels(wanted)
    others = ~np.isin(np.arange(22), [5, 20])
    np.testing.assert_array_equal(found[others], usual[others])
    assert (found[20] == 128).all()
    # Drawn with the third noise that its number gives.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 5), 2)
    draws = jax.random.normal(key, (1, 16, 4))
    label = np.array([5 % 3], np.int32)
    image = tfj.sample(MODEL, VARIABLES, draws, label, guidance=PLAN.guidance)
    image = tfj.denoise(MODEL, VARIABLES, image, label, noise_std=0.1, strength=0.5)
    assert np.abs(found[5].astype(int) - pictures.to_pixels(image)[0]).max() <= 1


@pytest.mark.slow
def test_features_and_levels_of_samples(tmp_path):
    model = MODEL.clone(num_features=2, noise_conditioned=True)
    variables = random_variables(model)
    features = np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
    of = functools.partial(plan_of, model, noise='levels', noise_std=0.3)
    plan, mesh = of(features=features), sharding.make_mesh()
    others = [of(features=features[::-1]), of(features=features, levels=(0.1,)), of()]
    known = [bulk.fingerprint(p, variables, 'a', **HOW) for p in (plan, *others)]
    assert len(set(map(bulk.folder_name, known))) == 4
    for folder, batch_size in (('eight', 8), ('sixteen', 16)):
        bulk.draw_set(
            tmp_path / folder, plan, variables, count=11, batch_size=batch_size, mesh=mesh,
            fingerprint=known[0], **HOW,
        )
    key = jax.random.key(3)
    keys = [jax.random.fold_in(jax.random.fold_in(key, i), 0) for i in range(11)]
    noise = np.stack([jax.random.normal(k, (16, 4)) for k in keys])
    numbers = np.arange(11)
    condition = tfj.Condition(
        (numbers % 3).astype(np.int32), np.float32(0.3), features[numbers % 5]
    )
    images = tfj.sample(model, variables, noise, condition)
    images = tfj.iterative_denoise(
        model, variables, images, condition, levels=plan.denoising.levels
    )
    for folder in ('eight', 'sixteen'):
        found = pixels(tmp_path / folder).astype(int)
        assert np.abs(found - pictures.to_pixels(images)).max() <= 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_steps_of_denoising_beside_the_bar(tmp_path, monkeypatch):
    model = tiny((1,), image_channels=1, noise_conditioned=True)
    variables, plan = random_variables(model), plan_of(model, noise='levels', noise_std=0.3)
    known = bulk.fingerprint(plan, variables, 'a', **HOW)
    give = functools.partial(
        bulk.draw_set, plan=plan, variables=variables, count=11, batch_size=8,
        mesh=sharding.make_mesh(), fingerprint=known, **HOW,
    )
    give(tmp_path / 'without')
    monkeypatch.setattr(sys, 'stderr', Terminal())
    give(tmp_path / 'with')
    shown = sys.stderr.getvalue()
    for step in (1, 2, 3):
        assert shown.count(f'denoising step {step} of 3') >= 2  # of two batches
    assert contents(tmp_path / 'with') == contents(tmp_path / 'without')


def test_the_noise_of_denoising_is_each_images_own(tmp_path):
    model = tiny((1,), image_channels=1, noise_conditioned=True)
    variables, mesh = random_variables(model), sharding.make_mesh()
    plan = plan_of(model, noise='levels', noise_std=0.3)
    plan = dataclasses.replace(plan, denoising=dataclasses.replace(plan.denoising, solver='sde'))
    known = bulk.fingerprint(plan, variables, 'a', **HOW)
    for folder, batch_size in (('eight', 8), ('sixteen', 16)):
        bulk.draw_set(
            tmp_path / folder, plan, variables, count=11, batch_size=batch_size, mesh=mesh,
            fingerprint=known, **HOW,
        )
    found, wanted = (pixels(tmp_path / folder).astype(int) for folder in ('eight', 'sixteen'))
    assert np.abs(found - wanted).max() <= 1


def test_fingerprint():
    of = functools.partial(bulk.fingerprint, PLAN, VARIABLES, 'step_0000012')
    assert bulk.folder_name(KNOWN) == bulk.folder_name(of(**HOW))
    assert json.loads(json.dumps(KNOWN)) == KNOWN  # as a finished set has it
    assert re.fullmatch(r'step_0000012-guidance_0.5-[0-9a-f]{8}', bulk.folder_name(KNOWN))
    moved = jax.tree.map(lambda x: x, VARIABLES)
    kernel = moved['params']['block_0']['proj_in']['kernel']
    moved['params']['block_0']['proj_in']['kernel'] = kernel[::-1]
    weaker = dataclasses.replace(PLAN, guidance=tfj.Guidance(weight=0.4))
    narrow, mixed, fast = (
        dataclasses.replace(PLAN, model=MODEL.clone(**fields))
        for fields in (
            dict(dtype='bfloat16'), dict(dtype='bfloat16', residual_dtype='float32'),
            dict(precision='high'),
        )
    )
    plans = [
        plan_of(MODEL, weight=0.5, **{'strength': 0.5} | fields)
        for fields in (dict(label=1), dict(strength=0.0), dict(noise_std=0.2))
    ]
    others = [
        of(seed=4),
        *(
            bulk.fingerprint(p, VARIABLES, 'step_0000012', **HOW)
            for p in (weaker, narrow, mixed, fast, *plans)
        ),
        bulk.fingerprint(PLAN, moved, 'step_0000012', **HOW),
        bulk.fingerprint(PLAN, VARIABLES, 'step_0000013', **HOW),
    ]
    assert len({bulk.folder_name(known) for known in [KNOWN, *others]}) == 11
    # How it is computed makes no difference.
    mesh = sharding.make_mesh(fsdp=4, tensor=2, data=1)
    split = jax.device_put(VARIABLES, sharding.shardings(VARIABLES, mesh))
    layout = PLAN.on(sharding.Layout(mesh))
    assert bulk.fingerprint(layout, split, 'step_0000012', **HOW) == KNOWN


def test_folder_of_another_set(wanted):
    before = files(wanted)
    other = KNOWN | {'seed': 4}
    with pytest.raises(ValueError, match='another fingerprint .see its samples.json.; choose'):
        draw(wanted, fingerprint=other, count=30)
    assert files(wanted) == before
