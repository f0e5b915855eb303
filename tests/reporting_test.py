"""The report of a workdir: at the end of training, and by --mode=report."""

import jax
import pytest
from command_line import ROOT, call, compilations, files, flags, write_images

SMALL = dict(
    report__rows=2, report__columns=2, report__guidance_weights='(1.0,)',
    report__training_images=96, report__test_images=20,
)


def test_training_ends_with_a_report_and_the_mode_writes_it_again(tmp_path, capfd):
    images = write_images(tmp_path / 'images')
    workdir = tmp_path / 'run'
    fields = dict(SMALL, guidance__weight=1.0, report__after_training=True, train__epochs=0.5, train__warmup_epochs=0.0,
                  train__sample_every=1)
    assert call(*flags(workdir, images, **fields)) == 0
    page = workdir / 'report.html'
    first = page.read_text()
    assert 'the report took' in capfd.readouterr().err
    assert 'metrics.jsonl is missing' not in first
    assert 'The score of the test set is missing' in first  # no metric was asked for
    assert 'step 3 of' in first and 'among 96 of 96 evenly spaced' in first
    # The grids of the three steps, and samples with the config's guidance.
    assert '&quot;step 3' in first and 'with guidance weight 1, then denoised' in first

    page.unlink()
    (workdir / 'report.json').unlink()
    (workdir / 'metrics.jsonl').unlink()
    kept = lambda: {k: v for k, v in files(workdir).items() if not k.startswith('compiled')}  # noqa: E731
    before = kept()
    assert call(*flags(workdir, images, guidance__weight=1.0, **SMALL), '--mode=report') == 0
    second = page.read_text()
    assert kept().keys() - before.keys() == {'report.html', 'report.json'}
    assert before.items() <= kept().items()
    assert 'metrics.jsonl is missing' in second
    # The same checkpoint and seed draw the same pictures.
    pictures = [[line for line in text.split('"') if line.startswith('data:image/png')]
                for text in (first, second)]
    assert len(pictures[0]) > 10 and pictures[0] == pictures[1]


@pytest.mark.slow
def test_smoke_config(tmp_path):
    given = [f'--config={ROOT}/configs/colour64.py:smoke', f'--workdir={tmp_path}', '--config.evaluate.metrics=()']
    assert call(*given, '--config.report.after_training=False') == 0
    assert not (tmp_path / 'report.html').exists()
    assert call(*given, '--mode=report') == 0
    assert (tmp_path / 'report.html').stat().st_size < 10e6


def test_several_processes_are_refused(tmp_path, monkeypatch, capfd):
    images = write_images(tmp_path / 'images')
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    before = len(compilations)
    assert call(*flags(tmp_path / 'run', images), '--mode=report', '--distributed=off') == 2
    error = capfd.readouterr().err
    assert '--mode=report is for one process' in error and error.count('\n') == 1
    assert len(compilations) == before
