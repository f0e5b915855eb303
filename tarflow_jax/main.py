"""The command line.

    python -m tarflow_jax.main --config=configs/NAME.py --workdir=DIR [--mode=MODE]
        [--config.field=value ...]

Without --config, a workdir with a checkpoint uses the config of its training.

Modes:
  train        train, or resume from the newest checkpoint; then sample, evaluate and report
  sample       draw images from the workdir's newest checkpoint, or resume drawing them
  evaluate     score it by config.evaluate.metrics: bits/dim, Frechet distance and others
  report       write WORKDIR/report.html, what the flow has learned; --workdir=A,B compares runs
  likelihood   write the log density of each image of --images to a CSV
  interpolate  draw what lies between pairs of images
  complete     draw the part of images that --known leaves out
  convert      official checkpoint to workdir (--input), or workdir to official (--output)
  compile      compile a step for TPU slices on a machine without TPUs: what fits, what it costs
"""

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

try:
    import jax
except ValueError as error:  # a variable JAX_... has an invalid value
    if __name__ != '__main__':
        raise
    print(f'error: {error}; correct or unset it.', file=sys.stderr)
    sys.exit(2)
from absl import flags
from ml_collections import config_flags

from tarflow_jax import (
    commands,
    comparing,
    config_of_run,
    config_paths,
    config_ranges,
    environment,
    lock,
    paths,
)
from tarflow_jax import config as configs
from tarflow_jax.training import compiled, processes, sharding
from tarflow_jax.training.checkpoint import CheckpointError, Unreadable
from tarflow_jax.training.loop import Diverged, Stopped

log = logging.getLogger('tarflow_jax')


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit code for launchers.

    0: done; 1: the run failed; 2: invalid input; 75: stopped by SIGTERM, to be restarted;
    76: diverged; 130: Ctrl-C.
    """
    _log_to_stderr()
    try:
        given = _parse(argv)
        if given.help:
            print(__doc__, given, sep='\n')
            return 0
        job = _comparison(given) or _job(given)
    except (environment.Unavailable, processes.Alone) as error:
        log.error('error: %s', error)
        return 1
    except (ValueError, OSError) as error:
        log.error('error: %s', _one_line(error))
        return 2
    except KeyboardInterrupt:
        log.info('stopped before anything was done; run the same command again')
        return 130
    try:
        job()
    except Stopped as stopped:
        return stopped.code
    except KeyboardInterrupt:
        log.info('stopped; %s', commands.INTERRUPTED[given.mode])
        return 130
    except CheckpointError as error:
        log.error('error: %s', error)
        # Otherwise tracebacks of Orbax's threads at exit would hide this sentence.
        os._exit(2 if isinstance(error, Unreadable) else 1)
    except (Diverged, OSError) as error:  # such as no room for metrics or pictures
        log.error('error: %s', error)
        codes = {Diverged: processes.DIVERGED, lock.Taken: 2}
        return _leave(codes.get(type(error), 1))
    except Exception:
        if jax.process_count() == 1:
            raise
        log.exception('process %d failed', jax.process_index())
        return _leave(1)
    return 0


def _comparison(given) -> Callable[[], None] | None:
    """The work of --mode=report with several workdirs, which needs no config and no devices."""
    several = comparing.several(given.workdir) if given.mode == 'report' else []
    return commands.compare(several, given) if several else None


def _job(given) -> Callable[[], None]:
    """Starts the devices and returns the work of a mode; see `commands`."""
    config = given.config
    config_paths.resolve(config, given)
    environment.check()
    processes.start(given.distributed)
    sharding.use_cores_as_devices(config.train.batch_size // max(config.train.accumulation, 1))
    environment.start_devices()
    if jax.process_index() > 0:
        log.setLevel(logging.WARNING)  # only the first process logs progress
    compiled.keep_in(given.workdir)
    return commands.MODES[given.mode](config, given)


def _one_line(error: Exception) -> str:
    """Returns an error's message in one line; values in it may be long and arbitrary."""
    text = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
    return re.sub(r'(\S{300})\S{20,}', r'\1...', text)


def _leave(code: int) -> int:
    """Returns the code; of several processes, ends this one at once, so that none waits for it."""
    if jax.process_count() > 1:
        os._exit(code)
    return code


_TEXT_FLAGS = {
    'workdir': 'Folder of the run: checkpoints, metrics and pictures. With report, several folders '
    'joined by commas are compared.',
    'input': "Official checkpoint (.pth or .safetensors) to use instead of the workdir's, with "
    'sample, evaluate and convert.',
    'output': 'File to write: an official checkpoint (.safetensors) for convert, a CSV for '
    'likelihood, a PNG for interpolate and complete.',
    'step': "Checkpoint of the workdir to use: a step, or 'best' for the lowest validation loss; "
    'without it the newest.',
    'images': 'Folder, .zip or .tar of images for likelihood, interpolate and complete, in place '
    'of the test set.',
    'known': 'Part of the images that complete keeps: upper, lower, left, right, border, or an '
    'image file that is white there.',
    'gif': 'File for an animation (.gif) of the way from noise to the first samples, with sample.',
    'json': 'File for what compile found, one object per topology.',
    'out': 'Folder for the text of compiled programs.',
    'profile_steps': 'START:END, train steps to trace into WORKDIR/tensorboard for its profiler.',
}


def _flags(argv: list[str], saved: config_of_run.Saved | None) -> flags.FlagValues:
    """Defines the flags, separately from the global ones, so that `main` uses its own argv."""
    f = flags.FlagValues()
    meaning = (
        'Python file with get_config(), such as configs/fashion_mnist.py; its fields are '
        '--config.FIELD=VALUE. Without it, the config of the checkpoint in the workdir.'
    )
    if saved is None or _values_of('config', argv):
        config_flags.DEFINE_config_file('config', None, meaning, flag_values=f, sys_argv=argv)
    else:
        config_flags.DEFINE_config_dict(
            'config', config_of_run.whole(saved, _mode(argv) == 'train'), meaning, flag_values=f,
            sys_argv=argv,
        )
    for name, meaning in _TEXT_FLAGS.items():
        flags.DEFINE_string(name, None, meaning, flag_values=f)
    flags.DEFINE_enum(
        'mode', 'train', list(commands.MODES), 'What to do; see above.', flag_values=f
    )
    flags.DEFINE_list(
        'topology', [], 'TPU slices to compile for, such as v5e:4x4,v5e:16x16,v4:4x4x4; write '
        '2*v5e:16x16 for two slices joined by the datacenter network.', flag_values=f,
    )
    flags.DEFINE_enum(
        'program', 'train', ('train', 'evaluate', 'sample'), 'What to compile.', flag_values=f
    )
    flags.DEFINE_integer(
        'batch_per_chip', None, "Images per chip, instead of the config's batch_size, for the "
        'program to compile.', lower_bound=1, flag_values=f,
    )
    flags.DEFINE_enum(
        'distributed', 'auto', processes.MODES, 'Whether this is one of several processes: auto '
        'reads the environment, on asks JAX (needed on Cloud TPU VMs).', flag_values=f,
    )
    flags.DEFINE_boolean('help', False, 'Show this.', flag_values=f)
    return f


def _parse(argv: list[str]) -> flags.FlagValues:
    """Parses the flags of the command line; raises ValueError if they are invalid."""
    argv = _config_first(_last_of_tuples(argv))
    argv = [
        f'{word[:9]}{os.path.expanduser(word[9:])}' if word.startswith('--config=') else word
        for word in argv
    ]
    _check_file(argv)
    saved, known = None, list(_TEXT_FLAGS)
    workdirs = _values_of('workdir', argv)
    compares = _mode(argv) == 'report' and bool(workdirs and comparing.several(workdirs[-1]))
    if workdirs and workdirs[-1] and not compares:
        label = f'--workdir={workdirs[-1]}'
        workdir = paths.resolved(workdirs[-1], label, 'folder')
        paths.reach(workdir, label, write=False)
        step = (_values_of('step', argv) or [''])[-1]
        saved = config_of_run.saved(workdir, int(step) if step.isdecimal() else step)
    try:
        given = _flags(argv, saved)
        known = list(given)
        rest = given(argv)
        config = given.config
        if config is not None:
            _ = config.seed  # raises now if the file cannot be read
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown_flag(error.flagname, known)) from error
    except flags.IllegalFlagValueError as error:
        wrong = re.match(r'flag --config\.([\w.]+)=(.*?): ', str(error), re.DOTALL)
        if wrong and wrong[1] in _fields():
            kind = config_ranges.kind_of(wrong[1], _fields()[wrong[1]])
            raise ValueError(f'config.{wrong[1]}={wrong[2]!r:.100} must be {kind}.') from error
        choices = re.search(r'=(.*): value should be one of <(.+)>', str(error))
        close = choices and difflib.get_close_matches(choices[1], choices[2].split('|'), 1)
        hint = f'did you mean {close[0]!r}?' if close else '--help lists the flags.'
        raise ValueError(f'{_sentence(error)}; {hint}') from error
    except (AttributeError, KeyError) as error:
        unknown = [name for name in _given_fields(argv) if name not in _fields()]
        closest = re.search(r'Did you mean "(.+?)" instead of "(.+?)"', str(error))
        if unknown:
            field, close = unknown[0], _closest_fields(unknown[0])
        elif closest:
            field, close = closest[2], [closest[1]]
        else:
            field, close = str(error).strip('\'"\\'), []
        hint = f'did you mean {_either(close)}?' if close else 'tarflow_jax/config.py lists them.'
        raise ValueError(f'the config has no field {field!r}; {hint}') from error
    except Exception as error:
        raise ValueError(f'{_sentence(error)}; --help lists the flags.') from error
    if len(rest) > 1:
        raise ValueError(f'{rest[1]!r} is not a flag; flags look like --workdir=DIR.')
    if config is None and not given.help and not compares:
        there = f', and --workdir={workdirs[-1]} has no checkpoint' if any(workdirs[-1:]) else ''
        raise ValueError(
            f'--config is missing{there}; pass a file such as configs/fashion_mnist.py, or as '
            '--workdir the folder of a run, whose checkpoint has its config.'
        )
    if saved and config is not None:
        _say_changes(given, saved, _given_fields(argv), file=bool(_values_of('config', argv)))
    return given


def _say_changes(given, saved: config_of_run.Saved, fields: list[str], file: bool) -> None:
    """Logs which fields of the config come from the checkpoint, or what the command changes."""
    config, message = given.config, None
    if not file:
        there = config_of_run.whole(saved, given.mode == 'train').to_dict()
        there, now = config_ranges.fields(there), config_ranges.fields(config.to_dict())
        changed = {name: (there[name], now[name]) for name in fields if now[name] != there[name]}
        message = f'the config is that of {saved.name}'
        message += f', with {config_of_run.told(changed)}' if changed else ''
    elif given.mode not in ('train', 'compile') and not given.input:
        if changed := config_of_run.adopt(config, saved, fields):
            message = (
                f'taken from {saved.name}, because the command does not set them: '
                f'{config_of_run.told(changed)}'
            )
    if message:
        log.info('%s', message)


def _sentence(error: Exception) -> str:
    # config_flags passes on the config file's exception with its traceback; the message is last.
    lines = [line for line in str(error).splitlines() if line.strip(' ;')]
    return re.sub(r'^\s*(\[Errno \d+\]|\w+Error:) ', '', lines[-1]).rstrip('.')


def _values_of(name: str, argv: list[str]) -> list[str]:
    """Returns the values of a flag before the flags are parsed."""
    given = [re.fullmatch(rf'--?{name}(?:=(.*))?', word, re.DOTALL) for word in argv[1:]]
    return [
        match[1] if match[1] is not None else argv[i + 1]
        for i, match in enumerate(given, 1) if match and (match[1] is not None or argv[i + 1 :])
    ]


def _mode(argv: list[str]) -> str:
    return (_values_of('mode', argv) or ['train'])[-1]


def _check_file(argv: list[str]) -> None:
    """Raises ValueError, with the closest existing config, if the --config file does not exist."""
    for value in _values_of('config', argv):
        path = Path(re.sub(r'(\.py):.*', r'\1', value))
        if not value or path.is_file():
            continue
        # Search the given folder, the current one, and the clone that may contain this package.
        folders = (path.parent, Path('configs'), Path(__file__).parents[1] / 'configs')
        there = {file.stem: file for folder in reversed(folders) for file in folder.glob('*.py')}
        close = difflib.get_close_matches(path.name.removesuffix('.py'), there, 1)
        hint = 'use one such as configs/fashion_mnist.py of the repository.'
        if close:
            hint = f'did you mean {there[close[0]]}?'
        elif there:
            hint = f'there are {", ".join(str(there[stem]) for stem in sorted(there))}.'
        raise ValueError(f'--config={value}: the file does not exist; {hint}')


def _given_fields(argv: list[str]) -> list[str]:
    found = (re.match(r'--?(?:no)?config\.([\w.]+)', word) for word in argv[1:])
    return [match[1] for match in found if match]


def _fields() -> dict:
    """Returns sections and fields of the config with defaults, such as 'model', 'model.width'."""
    return config_ranges.fields(configs.default().to_dict())


def _last_of_tuples(argv: list[str]) -> list[str]:
    """Keeps only the last value of each tuple field, because config_flags would append to it.

    For fields of other types, the last value already wins.
    """
    tuples = {f'config.{name}' for name, value in _fields().items() if isinstance(value, tuple)}
    groups: list[list[str]] = []  # each word, with the next one if that is its value
    for word in argv:
        if groups and len(groups[-1]) == 1 and groups[-1][0].lstrip('-') in tuples:
            groups[-1].append(word)
        else:
            groups.append([word])
    names = [group[0].partition('=')[0].lstrip('-') for group in groups]
    return [
        word for i, group in enumerate(groups) for word in group
        if names[i] not in tuples or names[i] not in names[i + 1 :]
    ]


def _config_first(argv: list[str]) -> list[str]:
    """Moves --config before its fields, as config_flags requires."""
    for i, word in enumerate(argv[1:], 1):
        if word.lstrip('-') == 'config' or word.lstrip('-').startswith('config='):
            end = i + 1 if '=' in word else i + 2
            return [argv[0], *argv[i:end], *argv[1:i], *argv[end:]]
    return argv


def _closest_fields(name: str) -> list[str]:
    """Returns likely intended fields: with a similar name, or in another section."""
    elsewhere = [field for field in _fields() if field.split('.')[-1] == name.split('.')[-1]]
    return difflib.get_close_matches(name, _fields(), 1, 0.75) or elsewhere


def _unknown_flag(name: str, known: list[str]) -> str:
    close = [f'--{flag}' for flag in difflib.get_close_matches(name, known, 1)]
    close = close or [f'--config.{field}' for field in _closest_fields(name)]
    hint = f'did you mean {_either(close)}?' if close else '--help lists the flags.'
    return f'--{name} is not a flag; {hint}'


def _either(names: list[str]) -> str:
    return ' or '.join(names if names[0].startswith('--') else map(repr, names))


def _log_to_stderr() -> None:
    # Orbax and others log a lot through absl; their warnings are enough.
    logging.basicConfig(
        level=logging.WARNING, format='%(asctime)s %(message)s', datefmt='%H:%M:%S', force=True
    )
    log.setLevel(logging.INFO)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
