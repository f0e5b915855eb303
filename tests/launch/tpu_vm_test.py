import subprocess
import tarfile

import pytest

WHERE = ['--zone=z1', '--project=p1']
BASE = ['--name=flow', *WHERE, '--type=v5litepod-16', '--poll=0']
QUEUED = ['gcloud', 'compute', 'tpus', 'queued-resources']
VM = ['gcloud', 'compute', 'tpus', 'tpu-vm']
ABSENT = {'when': 'resources describe', 'code': 1, 'err': 'ERROR: NOT_FOUND: no such resource\n'}
CREATE = [*QUEUED, 'create', 'flow', *WHERE, '--node-id=flow', '--accelerator-type=v5litepod-16',
          '--runtime-version=v2-alpha-tpuv5-lite']
DELETE = [*QUEUED, 'delete', 'flow', *WHERE, '--force', '--quiet']


def state(name):
    return {'when': 'resources describe', 'out': f'{name}\n'}


def workers(*words):
    return {'when': 'echo tarflow running', 'out': ''.join(f'tarflow {word}\n' for word in words)}


def steps(calls):
    """What happened, in one word each."""
    names = []
    for call in calls:
        if call[3] == 'queued-resources':
            names.append(call[4])
        elif call[4] == 'scp':
            names.append('copy' if call[6].startswith('flow') and ':' in call[6] else 'fetch')
        elif call[4] == 'describe':
            names.append('count')
        else:
            command = call[-1]
            names.append('look' if 'echo tarflow' in command else 'start' if 'nohup' in command
                         else 'stop' if 'touch stopped' in command else 'install')
    return names


@pytest.fixture
def checkout(stubs):
    folder = stubs.folder / 'a checkout'
    (folder / '.git').mkdir(parents=True)
    (folder / '.git' / 'big').touch()
    (folder / 'setup.cfg').touch()
    return f'--source={folder}'


def run(stubs, checkout, answers, *flags, args=('a',)):
    stubs.answer('gcloud', *answers)
    return stubs.run('tpu_vm.sh', 'run', *BASE, checkout, *flags, '--', *args)


def test_up(stubs):
    stubs.answer('gcloud', ABSENT, state('WAITING_FOR_RESOURCES'), state('PROVISIONING'), state('ACTIVE'))
    assert stubs.run('tpu_vm.sh', 'up', *BASE, '--spot')[0] == 0
    look = [*QUEUED, 'describe', 'flow', *WHERE, '--format=value(state.state)']
    assert stubs.calls == [look, [*CREATE, '--spot'], look, look, look]


@pytest.mark.parametrize('kind, version', [
    ('v4-32', 'tpu-ubuntu2204-base'), ('v5litepod-256', 'v2-alpha-tpuv5-lite'),
    ('v5p-128', 'v2-alpha-tpuv5'), ('v6e-64', 'v2-alpha-tpuv6e'),
])
def test_runtime_version_by_type(stubs, kind, version):
    stubs.answer('gcloud', ABSENT, state('ACTIVE'))
    stubs.run('tpu_vm.sh', 'up', '--name=flow', '--zone=z1', '--poll=0', f'--type={kind}')
    assert stubs.calls[1][-2:] == [f'--accelerator-type={kind}', f'--runtime-version={version}']


def test_slices(stubs):
    stubs.answer('gcloud', ABSENT, state('ACTIVE'))
    stubs.run('tpu_vm.sh', 'up', *BASE, '--slices=2')
    assert stubs.calls[1][5:10] == ['flow', *WHERE, '--node-count=2', '--node-prefix=flow']
    stubs.run('tpu_vm.sh', 'stop', *BASE, '--slices=2')
    assert [call[5] for call in stubs.calls[3:]] == ['flow-0', 'flow-1']


def test_a_refused_request_is_an_error(stubs):
    stubs.answer('gcloud', ABSENT, {'when': 'create', 'code': 1})
    assert stubs.run('tpu_vm.sh', 'up', *BASE)[0] == 1
    assert steps(stubs.calls) == ['describe', 'create']


def test_a_request_that_always_fails_is_an_error(stubs):
    stubs.answer('gcloud', *[state('FAILED'), ABSENT] * 3, state('FAILED'))
    assert stubs.run('tpu_vm.sh', 'up', *BASE)[0] == 1
    assert steps(stubs.calls).count('create') == 3


def test_run_to_the_end(stubs, checkout, hard_args):
    answers = [ABSENT, *[state('ACTIVE')] * 4, workers('running', 'running'),
               workers('0', 'running'), workers('0', '0')]
    code, _, _ = run(stubs, checkout, [*answers, *[state('ACTIVE')] * 3], '--setup=true', args=hard_args)
    assert code == 0
    assert steps(stubs.calls) == ['describe', 'create', 'describe', 'describe', 'copy', 'install',
                                  'start', *['describe', 'look'] * 3]
    copy, install, start = stubs.calls[4:7]
    archive = stubs.folder / 'flow-source.tar.gz'
    assert copy == [*VM, 'scp', str(archive), 'flow:tarflow_source.tar.gz', *WHERE, '--quiet',
                    '--worker=all']
    assert './setup.cfg' in tarfile.open(archive).getnames()
    assert not any('.git' in name for name in tarfile.open(archive).getnames())
    for call in install, start:
        assert call[:-1] == [*VM, 'ssh', 'flow', *WHERE, '--quiet', '--worker=all']
        assert call[-1].startswith('--command=set -e\n')
    assert install[-1].splitlines()[1] == 'true'
    assert "pip install --quiet './tarflow/source[tpu,gcs]'" in install[-1]


def test_what_workers_run(stubs, checkout, hard_args, tmp_path):
    """The very commands that the workers get, run here with a home of their own."""
    run(stubs, checkout, [ABSENT, *[state('ACTIVE')] * 3, workers('0')], args=hard_args)
    start, look = (call[-1].removeprefix('--command=') for call in (stubs.calls[6], stubs.calls[8]))
    run_stop = stubs.run('tpu_vm.sh', 'stop', *BASE)
    assert run_stop[0] == 0
    stop = stubs.calls[-1][-1].removeprefix('--command=')
    home = tmp_path / 'home'
    source = home / 'tarflow' / 'source'
    source.mkdir(parents=True)
    launch = __file__.replace('tests/launch/tpu_vm_test.py', 'launch')
    (source / 'launch').symlink_to(launch)

    def on_worker(command):
        return subprocess.run(['bash', '-c', command], cwd=home, env=stubs.env | {'HOME': str(home)},
                              capture_output=True, text=True, check=True, timeout=20).stdout

    main = ['python', '-m', 'tarflow_jax.main', '--distributed=on', *hard_args]
    assert on_worker(look) == 'tarflow lost\n'
    for code in 0, 2:
        stubs.answer('python', {'code': code})
        on_worker(start)
        stubs.wait_for(lambda code=code: on_worker(look) == f'tarflow {code}\n')
    stubs.answer('python', {'hang': 75})
    on_worker(start)
    stubs.wait_hanging()
    assert on_worker(look) == 'tarflow running\n'
    on_worker(stop)
    stubs.wait_for(lambda: on_worker(look) == 'tarflow stopped\n')
    assert stubs.signals == ['SIGTERM']
    called = [call for call in stubs.calls if call[0] == 'python']
    assert called == [main] * 3
    assert 'exit code 2' in (home / 'tarflow' / 'train.log').read_text()


@pytest.mark.parametrize('lost', ['SUSPENDED', 'FAILED'])
def test_preemption_deletes_creates_installs_and_runs_again(stubs, checkout, lost):
    answers = [ABSENT, *[state('ACTIVE')] * 3, workers('running', '75'), state('SUSPENDING'),
               state('SUSPENDING'), state(lost), ABSENT, *[state('ACTIVE')] * 2, workers('0', '0')]
    assert run(stubs, checkout, answers)[0] == 0
    deploy = ['copy', 'install', 'start']
    assert steps(stubs.calls) == [
        'describe', 'create', 'describe', 'describe', *deploy, 'describe', 'look',
        'describe', 'describe', 'describe', 'delete', 'describe', 'create', 'describe', *deploy,
        'describe', 'look']
    assert DELETE in stubs.calls and stubs.calls.count(CREATE) == 2


def test_a_failing_question_changes_nothing(stubs, checkout):
    answers = [ABSENT, *[state('ACTIVE')] * 2,
               {'when': 'resources describe', 'code': 1, 'err': 'connection refused'}, state('ACTIVE'),
               {'when': 'echo tarflow', 'code': 255}, state('ACTIVE'), workers('0')]
    assert run(stubs, checkout, answers)[0] == 0
    assert steps(stubs.calls)[7:] == ['describe', 'describe', 'look', 'describe', 'look']


@pytest.mark.parametrize('words, code', [(('2', '2'), 2), (('running', '76'), 76), (('75', '1'), 1)])
def test_a_failure_stops_all_and_is_returned(stubs, checkout, words, code):
    answers = [ABSENT, *[state('ACTIVE')] * 3, workers(*words)]
    assert run(stubs, checkout, answers)[0] == code
    assert steps(stubs.calls)[-2:] == ['look', 'stop']


def test_stopped_on_purpose(stubs, checkout):
    answers = [ABSENT, *[state('ACTIVE')] * 4, workers('running', 'stopped'), workers('stopped', 'stopped')]
    assert run(stubs, checkout, answers)[0] == 75


def test_lost_workers_are_started_again(stubs, checkout):
    """Such as after the machine was maintained."""
    answers = [ABSENT, *[state('ACTIVE')] * 7, *[workers('lost', 'running')] * 3, workers('0', '0')]
    assert run(stubs, checkout, answers)[0] == 0
    assert steps(stubs.calls).count('start') == 2 and steps(stubs.calls).count('create') == 1


def test_a_failed_installation_is_tried_again(stubs, checkout):
    answers = [ABSENT, *[state('ACTIVE')] * 4, {'when': 'pip install', 'code': 1}, workers('0')]
    assert run(stubs, checkout, answers)[0] == 0
    assert steps(stubs.calls)[4:] == ['copy', 'install', 'describe', 'copy', 'install', 'start',
                                      'describe', 'look']


def test_a_run_that_is_there_is_only_watched(stubs, checkout):
    answers = [*[state('ACTIVE')] * 2, workers('running', 'running'), workers('0', '0')]
    assert run(stubs, checkout, answers)[0] == 0
    assert steps(stubs.calls) == ['describe', 'look', 'describe', 'look']


def test_logs(stubs, as_commands):
    stubs.answer('gcloud', {'when': 'tpu-vm describe', 'out': '2\n'})
    assert stubs.run('tpu_vm.sh', 'logs', *BASE, '--logs=l o')[0] == 0
    assert stubs.calls[1:] == [
        [*VM, 'scp', 'flow:tarflow/train.log', f'l o/worker_{i}.log', *WHERE, '--quiet', f'--worker={i}']
        for i in range(2)]


def test_down(stubs):
    assert stubs.run('tpu_vm.sh', 'down', *BASE)[0] == 0
    assert stubs.calls == [DELETE]


@pytest.mark.parametrize('flags', [[], ['--slices=2', '--spot', '--logs=l']])
def test_dry_run_prints_what_would_run(stubs, checkout, hard_args, flags):
    args = ['run', *BASE, checkout, *flags, '--', *hard_args]
    _, out, _ = stubs.run('tpu_vm.sh', '--dry_run', *args)
    assert not stubs.calls and not (stubs.folder / 'l').exists()
    count = {'when': 'tpu-vm describe', 'out': '1\n', 'always': True}
    stubs.answer('gcloud', ABSENT, *[state('ACTIVE')] * 3, workers('0'), workers('0'), count)
    assert stubs.run('tpu_vm.sh', *args)[0] == 0
    assert printed_by_shell(out) == stubs.calls


def printed_by_shell(text):
    """The gcloud calls in lines of shell, as bash reads them."""
    show = 'gcloud() { printf "%s\\0" gcloud "$@"; printf "\\1\\0"; }; tar() { :; }; mkdir() { :; }\n'
    out = subprocess.run(['bash', '-c', show + text], capture_output=True, text=True, check=True).stdout
    return [call.split('\0')[:-1] for call in out.split('\1\0')[:-1]]
