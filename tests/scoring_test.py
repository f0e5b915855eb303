"""Evaluation by name: the table, evaluation.json, and what is refused before anything runs."""

import json
import os
import platform
import shutil
from importlib import metadata

import jax
import numpy as np
import pytest
from command_line import call, ended, files, flags, start_processes, write_images

from tarflow_jax import json_files, scoring
from tarflow_jax.evaluation import statistics_files
from tarflow_jax.evaluation.frechet import Statistics
from tarflow_jax.evaluation.scores import SCORES

LATENTS = 1280  # of EfficientNet-Lite0


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images') / 'idx', train=48)


@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('trained') / 'run'
    assert call(*flags(workdir, images, train__epochs=0.7, train__warmup_epochs=0.0)) == 0
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / 'run')


def evaluate(workdir, images, *metrics, **fields) -> int:
    named = ','.join(f'"{name}"' for name in metrics)
    fields = dict(evaluate__metrics=f'({named},)', **fields)
    return call(*flags(workdir, images, **fields), '--mode=evaluate')


def report_in(workdir) -> dict:
    return json.loads((workdir / 'evaluation.json').read_text())


def test_what_it_takes_to_repeat_an_evaluation(workdir, images, capsys):
    assert evaluate(workdir, images, 'bits_per_dim', evaluate__draws=3, seed=5) == 0
    report = report_in(workdir)
    step = report['checkpoint'].pop('step')
    assert step == 2 and report['checkpoint'] == {'name': f'step 2 of {workdir}'}
    assert report['data']['split'] == 'test' and report['data']['images'] == 20
    assert len(report['data']['pixels_sha256']) == 64
    assert report['seed'] == 5 and report['config']['evaluate']['draws'] == 3
    assert report['versions']['python'] == platform.python_version()
    assert report['versions']['grain'] == metadata.version('grain')
    assert report['devices']['mesh']['data'] == 8 and report['devices']['processes'] == 1
    bits = report['scores']['bits_per_dim']
    assert bits['draws'] == 3 and bits['images'] == 20
    printed = capsys.readouterr().out
    assert 'bits/dim  ' in printed and f'{bits["bits_per_dim"]:.4f}' in printed
    bound = bits['importance_weighted_bits_per_dim']
    assert f'importance-weighted bound, K = 3  {bound:.4f}' in printed
    assert f'step 2 of {workdir}' in printed


def report_of(seed, step=3, **scores):
    return {
        'checkpoint': {'name': f'step {step} of W', 'step': step}, 'data': {'images': 3}, 'seed': seed,
        'scores': scores,
    }


LEVELS = {
    'levels': [0.1], 'bits_per_dim': [3.0], 'standard_error_over_images': [0.1],
    'noise_bits_per_dim': [2.0], 'image_bits_per_dim': [1.0],
    'image_standard_error_over_images': [0.1], 'images': 3, 'draws': 1,
}
BITS = {
    'bits_per_dim': 3.0, 'standard_error_over_images': float('nan'), 'images': 1, 'draws': 1, 'loss': 0.5,
}


def test_scores_are_added_to_those_there(tmp_path):
    scoring.write(tmp_path, report_of(1, step=3, bits_per_dim=BITS))
    scoring.write(tmp_path, report_of(2, step=5, levels=LEVELS))
    found = scoring.read(tmp_path)
    earlier = {'checkpoint': {'name': 'step 3 of W', 'step': 3}, 'data': {'images': 3}, 'seed': 1}
    assert list(found['scores']) == ['bits_per_dim', 'levels'] and found['checkpoint']['step'] == 5
    assert found['scores']['bits_per_dim'].pop('from') == earlier
    assert found['scores']['levels'] == LEVELS and found['seed'] == 2
    # A third leaves where the first is from.
    scoring.write(tmp_path, report_of(3, step=6, levels=LEVELS))
    found = scoring.read(tmp_path)
    assert found['scores']['bits_per_dim']['from'] == earlier
    assert 'scored earlier               with step 3 of W' in scoring.table(found)
    # The same numbers again, and no copy.
    scoring.write(tmp_path, report_of(4, step=7, bits_per_dim=BITS))
    assert 'from' not in scoring.read(tmp_path)['scores']['bits_per_dim']
    assert [path.name for path in tmp_path.iterdir()] == ['evaluation.json']


def test_full_disk_leaves_the_scores_there(tmp_path, monkeypatch):
    scoring.write(tmp_path, report_of(1, levels=LEVELS))
    before, write_bytes = (tmp_path / 'evaluation.json').read_text(), scoring.files.write_bytes

    def full(path, content):
        if path.name == 'evaluation.json':
            raise OSError(28, 'No space left on device')
        write_bytes(path, content)

    other = report_of(2, levels=LEVELS | {'images': 4})
    with monkeypatch.context() as patch:
        patch.setattr(scoring.files, 'write_bytes', full)
        for _ in range(2):
            with pytest.raises(OSError):
                scoring.write(tmp_path, other)
    assert {path.name for path in tmp_path.iterdir()} == {'evaluation.json', 'evaluation.0.json'}
    assert {path.read_text() for path in tmp_path.iterdir()} == {before}
    scoring.write(tmp_path, other)
    assert (tmp_path / 'evaluation.0.json').read_text() == before
    assert report_in(tmp_path) == json_files.sealed(other)
    # What is there need not be text.
    (tmp_path / 'evaluation.json').write_bytes(b'\xff\xfe')
    (tmp_path / 'evaluation.1.json').mkdir()
    scoring.write(tmp_path, other)
    assert (tmp_path / 'evaluation.2.json').read_bytes() == b'\xff\xfe'


def test_an_older_report_keeps_its_numbers(workdir, images):
    assert evaluate(workdir, images, 'bits_per_dim') == 0
    first = (workdir / 'evaluation.json').read_text()
    assert evaluate(workdir, images, 'bits_per_dim') == 0  # the same again
    assert not list(workdir.glob('evaluation.*.json'))
    assert evaluate(workdir, images, 'bits_per_dim', seed=1) == 0
    older = workdir / 'evaluation.0.json'
    assert older.read_text() == first and report_in(workdir)['seed'] == 1
    # A name that was freed is taken, and no other file.
    older.unlink()
    assert evaluate(workdir, images, 'bits_per_dim', seed=2) == 0
    assert [path.name for path in workdir.glob('evaluation.*.json')] == ['evaluation.0.json']
    assert json.loads(older.read_text())['seed'] == 1


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    assert scoring.read(tmp_path) is None
    report = {'checkpoint': {'name': 'step 3'}, 'data': {'images': 3}, 'scores': {}}
    scoring.write(tmp_path, report)

    def full_disk(file):
        raise OSError('No space left on device')

    with monkeypatch.context() as patch, pytest.raises(OSError, match='No space left'):
        patch.setattr(os, 'fsync', full_disk)
        scoring.write(tmp_path, report | {'seed': 1})
    assert scoring.read(tmp_path) == report
    text = (tmp_path / 'evaluation.json').read_text()
    open_ = json.dumps(report)  # by an earlier version
    for damaged in (
        '', '{"checkpoint": ', '[]', '{}', '[' * 10**5, text.replace('step 3', 'step 2'),
        open_.replace('3}', '"3"}'), open_.replace('3}', f'{"9" * 5000}}}'),
        open_.replace('{}', '{"bits_per_dim": {}}'), open_.replace('{}', '{"nosuch": {}}'),
        open_.replace('{}', '{"bits_per_dim": {"draws": [], "bits_per_dim": null}}'),
    ):
        assert damaged not in (text, open_)
        (tmp_path / 'evaluation.json').write_text(damaged)
        assert scoring.read(tmp_path) is None
    (tmp_path / 'evaluation.json').write_text(open_)
    assert scoring.read(tmp_path) == report
    (tmp_path / 'evaluation.json').write_bytes(open_.encode() + b'\xff')
    assert scoring.read(tmp_path) is None


def test_classification_and_outliers(workdir, images, tmp_path, capsys):
    other = write_images(tmp_path / 'other', test=9)
    given = dict(evaluate__outliers__source='idx', evaluate__outliers__path=str(other),
                 evaluate__outliers__images=7)
    assert evaluate(workdir, images, 'classification', 'outliers', **given) == 0
    scores = report_in(workdir)['scores']
    assert scores['classification']['images'] == 20
    sets = scores['outliers']['sets']
    assert [one['set'] for one in sets[:3]] == ['training set', 'test set', 'other']
    assert {one['images'] for one in sets} == {7}
    assert (workdir / 'outliers.png').stat().st_size > 1000
    printed = capsys.readouterr().out
    assert 'accuracy of argmax p(x | y)' in printed
    assert 'bits/dim of: test set, negative' in printed


def test_round_trip(workdir, images, capsys):
    assert evaluate(workdir, images, 'round_trip', evaluate__round_trip_images=3) == 0
    found = report_in(workdir)['scores']['round_trip']
    assert found['trusted']['float32'] == {'sampling': True, 'likelihood': True}
    assert found['float32']['image_z_image']['max'] < 1e-4
    assert len(found['bfloat16']['blocks']) == 1
    printed = capsys.readouterr().out
    assert 'float32 can be trusted for' in printed and 'sampling yes, likelihood yes' in printed


def test_frechet_distance(workdir, images, tmp_path, capsys):
    ours = tmp_path / 'theirs.npz'
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((40, LATENTS))
    statistics_files.write(ours, Statistics(40, spread.mean(0), np.cov(spread, rowvar=False)))
    with np.load(ours) as arrays:
        np.savez(ours, mu=arrays['mu'], sigma=arrays['sigma'])
    given = dict(evaluate__frechet__references=f'("train_flipped","train","{ours}")',
                 evaluate__frechet__neighbours=10, evaluate__frechet__batch_size=16)
    assert evaluate(workdir, images, 'frechet', **given) == 0
    found = report_in(workdir)['scores']['frechet']
    assert found['network']['name'] == 'efficientnet-lite0' and found['is_fid'] is False
    assert found['samples'] == 13
    flipped, plain, theirs = found['distances']
    assert [row['reference_images'] for row in found['distances']] == [48, 48, None]
    assert 0 < plain['distance'] != flipped['distance'] > 0
    # 13 test images of the kind of the training set are nearer to it than statistics of noise.
    assert 0 < plain['real_floor'] < theirs['real_floor']
    assert plain['real_floor_images'] == 13
    assert found['neighbours']['images_of_each'] == 10
    printed = capsys.readouterr().out
    assert 'efficientnet-lite0 (not FID)' in printed
    assert not any(line.startswith('FID') for line in printed.splitlines())
    assert 'to the file of the EDM suite' in printed

    # The second time neither samples nor statistics are computed, and the numbers are the same.
    kept = files(workdir / 'statistics') | files(workdir / 'samples')
    assert len(list((workdir / 'statistics').iterdir())) == 2
    assert evaluate(workdir, images, 'frechet', **given) == 0
    assert files(workdir / 'statistics') | files(workdir / 'samples') == kept
    assert report_in(workdir)['scores']['frechet'] == found

    # Samples from elsewhere, in the layout of the ADM suite.
    theirs = tmp_path / 'samples.npz'
    pixels = rng.integers(0, 256, (12, 16, 16, 1), np.uint8)
    np.savez(theirs, arr_0=pixels)
    given |= dict(evaluate__frechet__samples=str(theirs),
                  evaluate__frechet__references='("train",)')
    assert evaluate(workdir, images, 'frechet', **given) == 0
    found = report_in(workdir)['scores']['frechet']
    assert found['samples'] == 12 and found['samples_from'] == str(theirs)


@pytest.mark.parametrize(
    'metric, fields, words',
    [
        ('frechet', {'evaluate__frechet__network': 'vgg'}, ['vgg', 'inception']),
        ('frechet', {'evaluate__frechet__network': 'inception'},
         ['pt_inception-2015-12-05-6726825d.pth']),
        ('frechet', {'evaluate__frechet__weights': '/nosuch.pth'}, ['/nosuch.pth']),
        ('frechet', {'evaluate__frechet__references': '("/nosuch.npz",)'}, ['/nosuch.npz']),
        ('frechet', {'evaluate__frechet__samples': '/nosuch.npz'}, ['/nosuch.npz']),
        ('frechet', {'evaluate__frechet__samples': 'large.npz'},
         ['large.npz has images [32, 32, 3]', 'the training set has [16, 16, 1]']),
        ('frechet', {'evaluate__frechet__neighbours': 5}, ['evaluate.frechet.neighbours 5']),
        ('frechet', {'sample__count': 3}, ['3 samples and 48 training images']),
        ('outliers', {'evaluate__outliers__source': 'folder'}, ['folder']),
        ('outliers', {'evaluate__outliers__images': 0}, ['evaluate.outliers.images 0']),
        ('round_trip', {'evaluate__round_trip_images': 0}, ['evaluate.round_trip_images 0']),
    ],
)
def test_what_is_refused(workdir, images, tmp_path, monkeypatch, capfd, metric, fields, words):
    monkeypatch.chdir(tmp_path)
    np.savez('large.npz', arr_0=np.zeros((13, 32, 32, 3), np.uint8))
    before = files(workdir)
    assert evaluate(workdir, images, metric, **fields) == 2
    [line] = capfd.readouterr().err.splitlines()
    for word in words:
        assert word in line
    assert files(workdir) == before


def test_reference_of_another_network(workdir, images, tmp_path, capfd):
    path = tmp_path / 'statistics.npz'
    statistics_files.write(path, Statistics(9, np.zeros(4), np.eye(4)))
    fields = dict(evaluate__frechet__references=f'("{path}",)')
    assert evaluate(workdir, images, 'frechet', **fields) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert str(path) in line and '4' in line and str(LATENTS) in line


def test_scores_do_not_depend_on_the_batch_size(workdir, images):
    found = []
    for batch_size in (8, 24):
        assert evaluate(workdir, images, 'bits_per_dim', evaluate__batch_size=batch_size) == 0
        found.append(report_in(workdir)['scores']['bits_per_dim']['bits_per_dim'])
    assert abs(found[0] - found[1]) < 1e-6
    assert jax.process_count() == 1


def numbers(tree, path=()):
    """The numbers of a report by their place in it."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in numbers(value, (*path, key)).items()}
    return {path: tree} if isinstance(tree, float) else {}


@pytest.mark.slow
@pytest.mark.parametrize('count, names', [
    (4, ['bits_per_dim', 'classification']), (2, [name for name in SCORES if name != 'levels'])
])
def test_several_processes_find_the_same_numbers(workdir, images, tmp_path, count, names):
    fields = dict(
        evaluate__draws=2, evaluate__round_trip_images=8, evaluate__outliers__images=9,
        evaluate__frechet__neighbours=10, evaluate__frechet__references='("train_flipped",)',
        sample__count=12,
    )
    alone = shutil.copytree(workdir, tmp_path / 'alone')
    assert evaluate(alone, images, *names, **fields) == 0
    fields['evaluate__metrics'] = str(tuple(names))
    given = [*flags(workdir, images, **fields), '--mode=evaluate']
    started = start_processes(count, ['-m', 'tarflow_jax.main'], *given)
    for code, output in ended(started, timeout=480):
        assert code == 0, output
    reports = [report_in(folder) for folder in (alone, workdir)]
    assert reports[1]['devices']['processes'] == count
    one, many = (numbers(report['scores']) for report in reports)
    assert one.keys() == many.keys() and len(one) > 5 * len(names)
    assert one['bits_per_dim', 'bits_per_dim'] == pytest.approx(
        many['bits_per_dim', 'bits_per_dim'], abs=1e-6
    )
    for path, value in one.items():
        # What is rounding of bfloat16, or of float32, is not the same for other shapes of batches.
        if path[0] == 'round_trip' or 'histogram' in path or 'reliability' in path:
            continue
        assert many[path] == pytest.approx(value, rel=2e-3, abs=1e-5), path
