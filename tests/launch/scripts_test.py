"""What all scripts share."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / 'launch'
SCRIPTS = ['supervise.sh', 'local_processes.sh', 'tpu_vm.sh', 'gke.sh', 'slurm.sh']


def test_all_scripts_are_listed():
    assert {path.name for path in LAUNCH.glob('*.sh')} == {*SCRIPTS, 'common.sh'}
    readme = (LAUNCH / 'README.md').read_text()
    assert all(script in readme for script in SCRIPTS)


# That of this environment, even where it is not activated.
SHELLCHECK = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')


@pytest.mark.skipif(not SHELLCHECK, reason='shellcheck is not installed')
@pytest.mark.parametrize('script', [*SCRIPTS, 'common.sh'])
def test_shellcheck_finds_nothing(script):
    found = subprocess.run([SHELLCHECK, LAUNCH / script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


# What bash 3.2 (macOS) and 4.2 (CentOS 7) do not have, or end with "unbound variable" under set -u.
NEWER = {
    'an empty array': r'(?<!\+)"\$\{(rest|with_me|words|pids|left|extra|workers)\[@\]\}"',
    'mapfile': r'\b(mapfile|readarray)\b',
    'a descriptor of its own': r'exec \{\w+\}|\{\w+\}>',
    'wait -n': r'^\s*wait -n',
    'an associative array or reference': r'\b(local|declare|typeset) -[An]',
    'another case': r'\$\{\w+(,,|\^\^)',
    'both streams': r'&>>|\|&',
    'a pattern with brackets': r'=~ [^$].*\(',
    'coproc': r'^\s*coproc\b',
}
# Loops over arrays that are not empty there.
FILLED = ('for arg in "${rest[@]}"', 'for worker in "${workers[@]}"', 'command=(${with_me[@]+',
          'log "start: $(quoted "${rest[@]}")"')


@pytest.mark.parametrize('script', [*SCRIPTS, 'common.sh'])
def test_old_versions_of_bash(script):
    for number, line in enumerate((LAUNCH / script).read_text().splitlines(), 1):
        if line.lstrip().startswith('#') or any(known in line for known in FILLED):
            continue
        for what, pattern in NEWER.items():
            assert not re.search(pattern, line), f'{script}:{number} has {what}: {line}'


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_shows_the_usage(stubs, script):
    code, out, err = stubs.run(script, '--help')
    assert code == 0 and not err
    assert f'launch/{script}' in out and '--dry_run' in out
    assert '#!' not in out and 'set -e' not in out


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('flag', ['--colour=red', '--colour', '-x'])
def test_an_unknown_flag_is_named(stubs, script, flag):
    code, out, err = stubs.run(script, flag, '--', 'a')
    assert code == 2 and not out
    assert flag.split('=')[0] in err and len(err.splitlines()) == 1
    assert not stubs.calls


@pytest.mark.parametrize('script, args, named', [
    ('supervise.sh', [], 'command'),
    ('supervise.sh', ['--wait', '--', 'true'], '--wait'),
    ('supervise.sh', ['--wait=soon', '--', 'true'], '--wait=soon'),
    ('local_processes.sh', ['--', 'a'], 'N, the number'),
    ('local_processes.sh', ['two', '--', 'a'], 'two'),
    ('local_processes.sh', ['2', '--platform=tpu'], '--platform=tpu'),
    ('tpu_vm.sh', [], 'action'),
    ('tpu_vm.sh', ['leave', '--name=n', '--zone=z'], 'leave'),
    ('tpu_vm.sh', ['up', '--zone=z', '--type=v4-8'], '--name'),
    ('tpu_vm.sh', ['up', '--name=n', '--type=v4-8'], '--zone'),
    ('tpu_vm.sh', ['run', '--name=n', '--zone=z'], '--type'),
    ('tpu_vm.sh', ['up', '--name=n', '--zone=z', '--type=v9-8'], '--version'),
    ('tpu_vm.sh', ['up', '--name=a;b', '--zone=z', '--type=v4-8'], 'a;b'),
    ('gke.sh', ['--image=i'], '--name'),
    ('gke.sh', ['--name=n', '--accelerator=a', '--topology=2x2', '--claim=c', '--', 'a'], '--image'),
    ('gke.sh', ['--name=n', '--image=i', '--topology=2x2', '--claim=c', '--', 'a'], '--accelerator'),
    ('gke.sh', ['--name=n', '--image=i', '--accelerator=a', '--topology=2x2', '--', 'a'], '--claim'),
    ('gke.sh', ['--name=n', '--image=i', '--accelerator=a', '--topology=16', '--claim=c'],
     '--topology=16'),
    ('gke.sh', ['--name=n', '--image=i', '--accelerator=a', '--topology=3x2', '--claim=c'],
     '--topology=3x2'),
    ('slurm.sh', ['--', 'a'], 'Slurm job'),
])
def test_bad_usage_says_what_is_wrong(stubs, script, args, named):
    code, out, err = stubs.run(script, *args)
    assert code == 2 and not out
    assert named in err and len(err.splitlines()) == 1
    assert not stubs.calls
