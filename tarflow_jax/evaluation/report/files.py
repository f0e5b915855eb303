"""What training and evaluation have left in a workdir, for the report."""

import json
from pathlib import Path


def metrics(workdir) -> list[dict]:
    """The lines of metrics.jsonl, none if it is missing; not half a line of a killed run."""
    path = Path(workdir) / 'metrics.jsonl'
    found = []
    for line in path.read_text(errors='replace').splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get('step'), int):
            found.append(entry)
    return found


def evaluation(workdir) -> dict | None:
    """What evaluation.json holds; None if it is missing or is not what evaluation writes."""
    path = Path(workdir) / 'evaluation.json'
    try:
        found = json.loads(path.read_text())
        return found if {'checkpoint', 'scores', 'data'} <= found.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def replace(path, text: str) -> None:
    """Writes a file whole: whoever reads meanwhile sees the old one or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_text(text, encoding='utf-8')
    temporary.replace(path)
