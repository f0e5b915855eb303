"""Implements --mode=evaluate: computes scores and writes a file with all they depend on."""

import itertools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from tarflow_jax import files, json_files, paths
from tarflow_jax.data import kinds
from tarflow_jax.evaluation.scores import SCORES, Subject
from tarflow_jax.evaluation.versions import versions

FILE = 'evaluation.json'
_SHAPE = {
    'checkpoint': {'name': str, 'step?': (int, None)},
    'scores': {str: {'from?': {'checkpoint': {'name': str, 'step?': (int, None)}}}},
    'data': {'images': int, 'kind?': (str, None), 'caution?': str},
}

log = logging.getLogger(__name__)


def prepare(subject: Subject) -> Callable:
    """Checks the scores in config.evaluate.metrics, and returns the work; see `work` inside."""
    jobs = {name: SCORES[name].prepare(subject) for name in subject.config.evaluate.metrics}

    def work(variables, origin: dict, draw_samples: Callable) -> dict:
        """Prints the scores, writes evaluation.json and returns its contents.

        Args:
          origin: the origin of the variables, as JSON values, with a 'name'.
          draw_samples: function without arguments that returns the config's samples as (source,
            summary).
        """
        scores = {}
        for name, job in jobs.items():
            start = time.perf_counter()
            scores[name] = job(variables, draw_samples)
            log.info('%s took %.1f s', name, time.perf_counter() - start)
        report = {'checkpoint': origin} | about(subject) | {'scores': scores}
        if jax.process_index() == 0:
            print(*table(report), sep='\n', flush=True)
            report = write(subject.workdir, report)
        return report

    return work


def about(subject: Subject) -> dict:
    """Returns everything except the checkpoint that an evaluation depends on, as JSON values."""
    devices = subject.mesh.devices.ravel()
    data = {'images': len(subject.test)} | subject.test.about
    caution = kinds.mismatch(subject.config.data.expects, data.get('kind'))
    return {
        'data': data | ({'caution': caution} if caution else {}),
        'seed': subject.config.seed,
        'config': subject.config.to_dict(),
        'versions': versions(),
        'devices': {
            'kind': devices[0].device_kind,
            'mesh': dict(subject.mesh.shape),
            'processes': jax.process_count(),
        },
    }


def write(workdir: Path, report: dict) -> dict:
    """Writes evaluation.json, and keeps earlier scores that were not computed again.

    If scores are replaced, or the old file is damaged, the old file is kept under another name.

    Returns:
      the contents of the file.
    """
    path = workdir / FILE
    report = json.loads(json.dumps(report, default=_plain))
    before, scores = read(workdir), report['scores']
    if before is not None:
        report = _with_earlier(report, before)
    replaced = before is None or any(
        json.dumps(scores[name]) != json.dumps({k: v for k, v in result.items() if k != 'from'})
        for name, result in before['scores'].items() if name in scores
    )
    if replaced and path.exists():
        # Copy it, so that evaluation.json still exists if anything fails here. One copy is enough
        # for repeated failures.
        content = path.read_bytes()
        names = (workdir / f'evaluation.{k}.json' for k in itertools.count())
        free = (
            name for name in names
            if not name.exists() or name.is_file() and name.read_bytes() == content
        )
        files.write_bytes(next(free), content)
    files.write_bytes(path, (json.dumps(json_files.sealed(report), indent=2) + '\n').encode())
    log.info('scores are in %s', path)
    return report


def _with_earlier(report: dict, before: dict) -> dict:
    """Adds the scores that only the earlier report has, with their origin."""
    context = {name: value for name, value in before.items() if name != 'scores'}
    found = {name: {'from': context} | result for name, result in before['scores'].items()}
    found |= report['scores']
    return report | {'scores': {name: found[name] for name in SCORES if name in found}}


def read(workdir) -> dict | None:
    """Reads evaluation.json; returns None if it is missing or has wrong contents."""
    path = paths.of(workdir) / FILE
    try:
        found = json_files.read(path, _SHAPE)
        table(found)
        return found
    except FileNotFoundError:
        return None
    # An unsealed file may have any contents, so formatting a score may raise anything.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        log.warning('%s is damaged; ignoring it: %s', path, error)
        return None


def _plain(value):
    """Converts NumPy numbers to JSON values."""
    return value.item() if isinstance(value, np.generic) else str(value)


def table(report: dict) -> list[str]:
    """Formats a report in two columns."""
    data = report['data']
    rows = [('checkpoint', report['checkpoint']['name']), ('test set', _set_name(data))]
    if 'kind' in data:
        rows.append(('kind of images', kinds.described(data['kind'])))
    if 'caution' in data:
        rows.append(('caution', data['caution']))
    for name, result in report['scores'].items():
        rows += [('', ''), *score_rows(name, result)]
    width = max(len(name) for name, _ in rows)
    return [f'{name:{width}}  {value}'.rstrip() for name, value in rows]


def score_rows(name: str, result: dict) -> list[tuple[str, str]]:
    """Returns the rows of one score; the last row names the checkpoint of an earlier score."""
    rows = SCORES[name].rows(result)
    if 'from' in result:
        rows.append(('scored earlier', f'with {result["from"]["checkpoint"]["name"]}'))
    return rows


def _set_name(data: dict) -> str:
    return f'{data.get("dataset", "?")}, split {data.get("split", "?")}, {data["images"]} images'
