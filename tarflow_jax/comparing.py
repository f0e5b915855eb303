"""Compares runs on one page, with --mode=report --workdir=A,B.

The samples of a run come from its report.json, which its own report writes. Its curves and scores
come from metrics.jsonl and evaluation.json. No flow is loaded.
"""

import datetime
import logging
from collections.abc import Callable
from pathlib import Path, PurePath

from tarflow_jax import files, paths, scoring
from tarflow_jax.evaluation.report import kept
from tarflow_jax.training import metrics

LONGEST_NAME = 120  # characters of the runs' names in the name of the file

log = logging.getLogger(__name__)


def several(workdir: str | None) -> list[str]:
    """Returns the workdirs of --workdir=A,B; none if it is one folder, even with a comma in it."""
    if not workdir or ',' not in workdir or not paths.in_bucket(workdir) and Path(workdir).is_dir():
        return []
    return [one for one in workdir.split(',') if one]


def prepare(workdirs: list[str]) -> Callable[[], None]:
    """Checks the folders and returns the work, which writes the page into the first of them.

    Raises:
      ValueError: if there are fewer than two folders, or one of them has no run.
    """
    label = f'--workdir={",".join(workdirs)}'
    folders = [paths.resolved(one, f'--workdir={one}', 'folder') for one in workdirs]
    if len(set(folders)) < len(folders) or len(folders) < 2:
        raise ValueError(f'{label} must name at least two different runs to compare.')
    for folder in folders:
        paths.reach(folder, f'--workdir={folder}', write=folder == folders[0])
        there = paths.of(folder)
        if not any((there / name).exists() for name in (kept.FILE, metrics.FILE, scoring.FILE)):
            raise ValueError(
                f'--workdir={folder} has no run to compare: it has none of {kept.FILE}, '
                f'{metrics.FILE} and {scoring.FILE}; correct the folder.'
            )
    names = short_names(folders)
    target = paths.writable_folder(folders[0], f'--workdir={folders[0]}') / file_name(names)

    def job() -> None:
        # Only this needs the chart library, which takes time to load.
        from tarflow_jax.evaluation.report import comparison

        runs = [
            comparison.Run(
                name, folder, metrics=metrics.read(folder), evaluation=scoring.read(folder),
                kept=kept.read(paths.of(folder)),
            )
            for name, folder in zip(names, folders)
        ]
        date = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC')
        text = comparison.compare(runs, date)
        files.write_text(target, text)
        log.info('the comparison is in %s (%.1f MB)', target, len(text.encode()) / 1e6)

    return job


def short_names(folders: list[str]) -> list[str]:
    """Names runs by the shortest ends of their paths that differ."""
    parts = [PurePath(folder).parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ['/'.join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return folders


def file_name(names: list[str]) -> str:
    """Returns the name of the page, such as report_A_B.html."""
    joined = '_'.join(name.replace('/', '-') for name in names)
    return f'report_{joined if len(joined) <= LONGEST_NAME else f"{len(names)}_runs"}.html'
