"""What --mode=evaluate does: scores by name, and a file with all it takes to repeat them."""

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
    """Checks what config.evaluate.metrics need, and returns the work: see `work` inside."""
    jobs = {name: SCORES[name].prepare(subject) for name in subject.config.evaluate.metrics}

    def work(variables, origin: dict, draw_samples: Callable) -> dict:
        """Prints the scores and writes evaluation.json, whose content it returns.

        Args:
          origin: where the variables come from, as JSON values, with a 'name'.
          draw_samples: of nothing, gives the config's samples as (source, summary).
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
    """All it takes to repeat an evaluation beside the checkpoint, as JSON values."""
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
    """Writes evaluation.json, to which the scores there that are not scored again are added.

    If others are, or the file there is damaged, it keeps its content under a name of its own.

    Returns:
      what the file holds.
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
        # A copy: if anything fails here, evaluation.json is still there. One is enough, however
        # often it fails.
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
    """The report with the scores that only an earlier one has, which say where they are from."""
    context = {name: value for name, value in before.items() if name != 'scores'}
    found = {name: {'from': context} | result for name, result in before['scores'].items()}
    found |= report['scores']
    return report | {'scores': {name: found[name] for name in SCORES if name in found}}


def read(workdir) -> dict | None:
    """What evaluation.json holds; None if it is missing or is not what evaluation writes."""
    path = paths.of(workdir) / FILE
    try:
        found = json_files.read(path, _SHAPE)
        table(found)
        return found
    except FileNotFoundError:
        return None
    # Whatever the rows of a score meet in a file that was not sealed.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        log.warning('%s is damaged and ignored: %s', path, error)
        return None


def _plain(value):
    """numpy's numbers as JSON has them."""
    return value.item() if isinstance(value, np.generic) else str(value)


def table(report: dict) -> list[str]:
    """Lines of two columns, from a report as `write` takes it."""
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
    """The rows of one score, the last of which says so if it is from an earlier evaluation."""
    rows = SCORES[name].rows(result)
    if 'from' in result:
        rows.append(('scored earlier', f'with {result["from"]["checkpoint"]["name"]}'))
    return rows


def _set_name(data: dict) -> str:
    return f'{data.get("dataset", "?")}, split {data.get("split", "?")}, {data["images"]} images'
