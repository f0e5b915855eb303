"""What the pages of documentation hold: blocks, commands and links."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Fenced(NamedTuple):
    """A fenced block: the language behind its fence, the line it begins on, and its text."""

    language: str
    line: int
    text: str


def fenced(page: Path) -> list[Fenced]:
    found, opened = [], None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith('```'):
            if opened is None:
                opened = (line[3:].strip(), number, [])
            else:
                found.append(Fenced(*opened[:2], '\n'.join(opened[2])))
                opened = None
        elif opened is not None:
            opened[2].append(line)
    assert opened is None, f'{page} leaves a block open'
    return found


def run_python(page: Path, replaced: dict[str, str], namespace: dict | None = None) -> dict:
    """Runs the page's Python blocks, one after another in one namespace, which it returns.

    Each text of `replaced` must be there; it makes the numbers of the page those of a test.
    """
    namespace = {'__name__': 'documented'} if namespace is None else namespace
    blocks = [block for block in fenced(page) if block.language == 'python']
    whole = '\n'.join(block.text for block in blocks)
    for old in replaced:
        assert old in whole, f'{page} no longer has {old!r}'
    for block in blocks:
        text = block.text
        for old, new in replaced.items():
            text = text.replace(old, new)
        # Blank lines before it: tracebacks then show the line of the page.
        exec(compile('\n' * block.line + text, str(page), 'exec'), namespace)
    return namespace


def spans(page: Path) -> list[str]:
    """Inline code, outside fenced blocks."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', text)]
