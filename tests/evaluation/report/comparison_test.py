"""Several runs on one page, from what their reports have kept."""

import json

import numpy as np
import pytest
from command_line import call
from report_pages import EVALUATION, METRICS, checked, collected

from tarflow_jax import comparing, json_files
from tarflow_jax.evaluation.report import kept


def run(folder, *, report=True, metrics=METRICS, evaluation=EVALUATION, **fields):
    """A folder with what a finished run leaves for comparisons; returns it."""
    folder.mkdir(parents=True)
    lines = ''.join(json.dumps(line) + '\n' for line in metrics)
    (folder / 'metrics.jsonl').write_text(lines)
    if evaluation:
        (folder / 'evaluation.json').write_text(json.dumps(evaluation))
    if report:
        kept.write(folder, collected(**fields))
    return folder


def test_two_runs_on_one_page(tmp_path):
    times = [{'wall_time': 1e9 + 36 * i, 'images_per_second': 1.0} for i in range(3)]
    timed = [line | time for line, time in zip(METRICS, times)]
    validated = [*timed, {'step': 3, 'validation/loss': 0.25, 'validation/bits_per_dim': 4.0}]
    a = run(tmp_path / 'a', metrics=timed)
    scores = {'bits_per_dim': EVALUATION['scores']['bits_per_dim'] | {'bits_per_dim': 3.25}}
    b = run(tmp_path / '<b>', metrics=validated, evaluation=EVALUATION | {'scores': scores}, rows=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    assert call('--mode=report', f'--workdir={a},{b}') == 0
    page = a / 'report_a_<b>.html'
    after = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    assert after.keys() - before.keys() == {page} and before.items() <= after.items()
    read = checked(page.read_text())
    assert 'Comparison of a and <b>' in read.text and '4.568 (20 test images, step 12)' in read.text
    assert '3.250 (20 test images, step 12)' in read.text and 'not scored' in read.text
    # Three rows of samples of a, two of b.
    alts = [tag['alt'] for name, tag in read.tags if name == 'img']
    assert len(alts) == 5 and sum('<b>: ' in alt for alt in alts) == 2
    charts = [json.loads(text) for text in page.read_text().split('<script type="application/json">')[1:]
              for text in [text.split('</script>')[0]]]
    assert [len(chart['traces']) for chart in charts] == [3, 3]
    assert all(chart['hours'] for chart in charts)
    assert charts[0]['traces'][0]['meta']['hours'] == [0.01, 0.02, 0.03]
    colours = [trace['line']['color'] for trace in charts[0]['traces']]
    assert colours[1] == colours[2] != colours[0]


def test_runs_without_a_report_are_compared_without_samples(tmp_path):
    a, b = run(tmp_path / 'a'), run(tmp_path / 'b', report=False, evaluation=None, metrics=[])
    assert call('--mode=report', f'--workdir={a},{b}') == 0
    text = checked((a / 'report_a_b.html').read_text()).text
    assert 'b: its samples are not kept' in text and f'--workdir={b}' in text


@pytest.mark.parametrize('given, sentence', [
    ('{a},{a}', 'must name at least two different runs'),
    ('{a},{empty}', 'has no run to compare'),
    ('{a},', 'must name at least two different runs'),
    ('{a},{a}/metrics.jsonl', 'is a file, not a folder'),
])
def test_what_cannot_be_compared(tmp_path, capfd, given, sentence):
    a = run(tmp_path / 'a')
    assert call('--mode=report', f'--workdir={given.format(a=a, empty=tmp_path / "none")}') == 2
    error = capfd.readouterr().err
    assert sentence in error and error.count('\n') == 1
    assert not (tmp_path / 'none').exists()


def test_other_flags_have_no_meaning(tmp_path, capfd):
    a, b = run(tmp_path / 'a'), run(tmp_path / 'b')
    assert call('--mode=report', f'--workdir={a},{b}', '--out=x') == 2
    assert '--out=x has no meaning' in capfd.readouterr().err


def test_names_of_runs():
    assert comparing.short_names(['/runs/a', '/runs/b']) == ['a', 'b']
    assert comparing.short_names(['/x/1', '/y/1', '/y/2']) == ['x/1', 'y/1', 'y/2']
    assert comparing.file_name(['x/1', 'y/1']) == 'report_x-1_y-1.html'
    assert comparing.file_name(['a' * 90, 'b' * 90]) == 'report_2_runs.html'


def test_a_folder_with_a_comma_is_one(tmp_path):
    (tmp_path / 'a,b').mkdir()
    assert comparing.several(f'{tmp_path}/a,b') == [] == comparing.several(None)
    assert comparing.several(f'{tmp_path}/c,d') == [f'{tmp_path}/c', 'd']


@pytest.mark.parametrize('change', [
    lambda content: content | {'date': 3},
    lambda content: content | {'samples': [content['samples'][0] | {'picture': 'data:image/png;base64,"><b>'}]},
])
def test_kept_data_that_is_damaged_is_ignored(tmp_path, change):
    folder = run(tmp_path / 'a')
    content = kept.read(folder)
    assert [one['width'] for one in content['samples']] == [2 * 8 + 2] * 3
    (folder / 'report.json').write_text(json.dumps(change(content)))
    assert kept.read(folder) is None
    text = (folder / 'report.json').read_text()
    sealed = json_files.sealed(content)
    (folder / 'report.json').write_text(json.dumps(sealed | {'date': 'another'}))
    assert text and kept.read(folder) is None


def test_large_runs_stay_small(tmp_path):
    a = run(tmp_path / 'a', size=64, rows=10, columns=6)
    assert (a / 'report.json').stat().st_size < 1e6
    assert np.isfinite(kept.read(a)['noise_std'])
