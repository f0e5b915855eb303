"""Runs notebooks/tarflow.ipynb and writes docs/notebook.md: its text, what it prints, its pictures.

    pip install -e '.[test]' && python notebooks/show.py

Git keeps the notebook without outputs; this page shows them. Takes minutes on a CPU.
"""

import base64
import io
import re
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / 'docs' / 'notebook.md'
SETUP = 3  # the cells before: title, installation, imports
WIDEST = 800  # pixels of a picture

notebook = nbformat.read(FOLDER / 'tarflow.ipynb', as_version=4)
nbclient.NotebookClient(notebook, timeout=3600, kernel_name='python3').execute()
parts = [
    '# The notebook, as it runs\n\n'
    'This is what [the notebook](../notebooks/tarflow.ipynb) prints and draws on a CPU, without '
    'the\ntimes of training. `python notebooks/show.py` wrote this page.'
]
for old in PAGE.parent.glob('notebook_*.png'):
    old.unlink()
pictures = 0
for cell in notebook.cells[SETUP:]:
    if cell.cell_type == 'markdown':
        parts.append(re.sub(r'\s*\n\s*(?=[^\s|#-])', '\n', cell.source))
        heading = cell.source.splitlines()[0].lstrip('# ')
        continue
    printed = ''.join(output.text for output in cell.outputs if output.output_type == 'stream')
    printed = re.sub(r', \d+ s$', '', printed, flags=re.MULTILINE)  # of whatever machine this is
    if printed.strip():
        parts.append(f'```text\n{printed.strip()}\n```')
    for output in cell.outputs:
        if 'image/png' not in output.get('data', {}):
            continue
        pictures += 1
        name = f'notebook_{pictures}.png'
        picture = Image.open(io.BytesIO(base64.b64decode(output.data['image/png']))).convert('L')
        picture.thumbnail((WIDEST, WIDEST * 2))
        picture.quantize(64).save(PAGE.parent / name, optimize=True)
        parts.append(f'![{heading}]({name})')
PAGE.write_text('\n\n'.join(parts) + '\n')
