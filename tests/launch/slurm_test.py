import shutil
import signal
from pathlib import Path

import pytest

FAST = ['--wait=0']
LAUNCH = Path(__file__).parents[2] / 'launch'


def step(*args):
    return ['srun', '--kill-on-bad-exit=1', '--gpu-bind=none', '--output=logs/slurm_%j_task_%t.log',
            '--open-mode=append', 'python', '-m', 'tarflow_jax.main', *args]


def run(stubs, *args, **env):
    return stubs.run('slurm.sh', *FAST, *args, SLURM_JOB_ID='17', **env)


@pytest.mark.parametrize('code', [0, 2, 76, 130])
def test_final_codes_end(stubs, hard_args, code):
    stubs.answer('srun', {'code': code})
    assert run(stubs, '--', *hard_args)[0] == code
    assert stubs.calls == [step(*hard_args)]


def test_75_queues_again(stubs):
    stubs.answer('srun', {'code': 75})
    assert run(stubs, '--', 'a')[0] == 75
    assert stubs.calls == [step('a'), ['scontrol', 'requeue', '17']]


def test_no_requeue(stubs):
    stubs.answer('srun', {'code': 75})
    assert run(stubs, '--no_requeue', '--', 'a')[0] == 75
    assert stubs.calls == [step('a')]


def test_crashes_restart_the_step(stubs):
    stubs.answer('srun', {'code': 1}, {'code': 137})
    assert run(stubs, '--', 'a')[0] == 0
    assert stubs.calls == [step('a')] * 3


def test_gives_up(stubs):
    stubs.answer('srun', {'code': 1, 'always': True})
    assert run(stubs, '--max_restarts=2', '--', 'a')[0] == 1
    assert stubs.calls == [step('a')] * 3


@pytest.mark.parametrize('code', [75, 137])
def test_sigterm_goes_to_the_tasks_and_the_job_queues_again(stubs, code):
    stubs.answer('srun', {'hang': code})
    stubs.answer('scancel', {'code': 1})  # so that the script falls back on srun, which here ends
    process = stubs.start('slurm.sh', '--', 'a', SLURM_JOB_ID='17')
    stubs.wait_hanging()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75
    assert stubs.calls == [step('a'), ['scancel', '--signal=TERM', '17'], ['scontrol', 'requeue', '17']]


def test_finds_its_helpers_from_the_copy_that_sbatch_makes(stubs, tmp_path):
    spool = tmp_path / 'spool'
    spool.mkdir()
    shutil.copy(LAUNCH / 'slurm.sh', spool / 'slurm_script')
    code, _, _ = stubs.run(spool / 'slurm_script', '--', 'a', SLURM_JOB_ID='17',
                           SLURM_SUBMIT_DIR=str(LAUNCH.parent))
    assert code == 0 and stubs.calls == [step('a')]


def test_sbatch_reads_its_directives():
    """They count only before the first command."""
    lines = (LAUNCH / 'slurm.sh').read_text().splitlines()
    head = [line for line in lines[:lines.index('set -euo pipefail')] if line.startswith('#SBATCH ')]
    assert '#SBATCH --signal=B:TERM@120' in head and '#SBATCH --requeue' in head
    assert len(head) == sum(line.startswith('#SBATCH') for line in lines)


def test_dry_run_prints_what_would_run(stubs, as_commands, hard_args):
    _, out, _ = stubs.run('slurm.sh', '--dry_run', '--', *hard_args)
    assert not stubs.calls and not (stubs.folder / 'logs').exists()
    made, *printed = as_commands(out)
    assert made == ['mkdir', '-p', 'logs']
    run(stubs, '--', *hard_args)
    assert stubs.calls == printed
