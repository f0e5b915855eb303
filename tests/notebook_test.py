"""notebooks/tarflow.ipynb: in git it holds no outputs, and it runs from top to bottom."""

import ast
import json
import os
import re

import pytest
from documented import ROOT

PATH = ROOT / 'notebooks' / 'tarflow.ipynb'


def code_cells():
    return [cell for cell in json.loads(PATH.read_text())['cells'] if cell['cell_type'] == 'code']


def test_no_outputs_and_no_counts():
    assert len(code_cells()) > 5
    for cell in code_cells():
        assert cell['outputs'] == [] and cell['execution_count'] is None


def test_one_address_of_the_repository():
    """Whoever publishes the repository puts its address in place of one text."""
    found = {
        owner
        for page in (PATH, ROOT / 'README.md', ROOT / 'CONTRIBUTING.md')
        for owner in re.findall(r'github(?:\.com)?/([\w-]+)/tarflow_jax', page.read_text())
    }
    assert len(found) == 1, found


def test_is_python_without_magic():
    for cell in code_cells():
        ast.parse(''.join(cell['source']))


@pytest.mark.slow
def test_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip('nbclient')
    nbformat = pytest.importorskip('nbformat')
    # As a reader's kernel: without the eight devices of the tests, and with this checkout.
    monkeypatch.delenv('XLA_FLAGS', raising=False)
    paths = (str(ROOT), os.environ.get('PYTHONPATH'))
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, paths)))
    notebook = nbformat.read(PATH, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}
    ).execute()
    text = ''.join(
        output.get('text', '') for cell in notebook.cells for output in cell.get('outputs', [])
    )
    assert 'all tensors equal: True' in text
    pictures = sum(
        'image/png' in output.get('data', {})
        for cell in notebook.cells for output in cell.get('outputs', [])
    )
    assert pictures == 9
    if file := os.environ.get('TARFLOW_NOTEBOOK_RUN'):  # to look at what it made
        nbformat.write(notebook, file)
