import re
import shutil
import signal

import pytest

FAST = ['--wait=0', '--poll=0.05']


def supervised(stubs, *answers, flags=()):
    stubs.answer('python', *answers)
    return stubs.run('supervise.sh', *FAST, *flags, '--', 'python', 'train')


@pytest.mark.parametrize('code', [0, 2, 76, 130])
def test_final_codes_end(stubs, code):
    assert supervised(stubs, {'code': code})[0] == code
    assert stubs.calls == [['python', 'train']]


@pytest.mark.parametrize('answer', [
    {'code': 75}, {'code': 1}, {'code': 134}, {'kill': signal.SIGKILL}, {'kill': signal.SIGSEGV},
])
def test_others_restart(stubs, answer):
    assert supervised(stubs, answer, answer, {'code': 0})[0] == 0
    assert stubs.calls == [['python', 'train']] * 3


def test_gives_up_with_the_code_of_the_last_crash(stubs):
    code, _, err = supervised(stubs, {'code': 1}, {'code': 3}, {'kill': 9}, flags=['--max_restarts=2'])
    assert code == 137
    assert len(stubs.calls) == 3 and 'giving up' in err


def test_preemption_does_not_count(stubs):
    answers = [{'code': 75}] * 4 + [{'code': 1}, {'code': 0}]
    assert supervised(stubs, *answers, flags=['--max_restarts=1'])[0] == 0
    assert len(stubs.calls) == 6


def test_a_long_run_makes_the_count_start_again(stubs):
    answers = [{'code': 1}] * 4 + [{'code': 0}]
    assert supervised(stubs, *answers, flags=['--max_restarts=1', '--min_uptime=0'])[0] == 0
    assert len(stubs.calls) == 5


def test_waits_longer_after_every_crash(stubs):
    stubs.answer('python', *[{'code': 1}] * 3)
    (stubs.folder / 'bin' / 'sleep').symlink_to('/bin/true')
    _, _, err = stubs.run('supervise.sh', '--wait=100', '--max_restarts=3', '--', 'python')
    assert re.findall(r'restart in (\d+) s', err) == ['100', '200', '300']


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 75), (signal.SIGINT, 130),
                                          (signal.SIGTERM, 0), (signal.SIGTERM, 9)])
def test_signals_go_to_the_command_whose_code_is_returned(stubs, number, code):
    stubs.answer('python', {'hang': code})
    process = stubs.start('supervise.sh', *FAST, '--exit_file=code', '--', 'python')
    stubs.wait_hanging()
    process.send_signal(number)
    assert process.wait(10) == code
    assert stubs.signals == [number.name]
    assert len(stubs.calls) == 1
    assert (stubs.folder / 'code').read_text() == f'{code}\n'


def test_sigterm_between_two_runs(stubs):
    stubs.answer('python', {'code': 1})
    process = stubs.start('supervise.sh', '--wait=60', '--', 'python')
    while 'restart in 60 s' not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75
    assert len(stubs.calls) == 1


@pytest.mark.skipif(not shutil.which('setpriv'), reason='setpriv is not installed')
def test_the_command_is_told_when_the_supervisor_is_killed(stubs):
    stubs.answer('python', {'hang': 75})
    process = stubs.start('supervise.sh', '--watch_maintenance', *FAST, '--', 'python')
    stubs.wait_hanging()
    process.kill()
    process.wait(10)
    stubs.assert_all_ended()
    assert stubs.signals == ['SIGTERM']


@pytest.mark.parametrize('key, value', [('maintenance-event', 'TERMINATE_ON_HOST_MAINTENANCE'),
                                        ('preempted', 'TRUE')])
def test_a_maintenance_notice_saves_and_restarts_when_it_is_over(stubs, key, value):
    quiet = [{'when': 'maintenance-event', 'out': 'NONE'}, {'when': 'preempted', 'out': 'FALSE'}]
    stubs.answer('curl', *quiet * 2, {'when': key, 'out': value}, {'when': key, 'out': value},
                 {'when': 'maintenance-event', 'out': 'MIGRATE_ON_HOST_MAINTENANCE'})
    stubs.answer('python', {'hang': 75}, {'sleep': 0.3})
    code, _, err = stubs.run('supervise.sh', *FAST, '--watch_maintenance', '--', 'python', 'train')
    assert code == 0
    assert stubs.calls.count(['python', 'train']) == 2
    assert f'{key}={value}' in err
    address = f'http://metadata.google.internal/computeMetadata/v1/instance/{key}'
    assert ['curl', '-fsS', '-m', '5', '-H', 'Metadata-Flavor: Google', address] in stubs.calls


def test_without_a_metadata_server_it_only_runs(stubs):
    stubs.answer('curl', {'code': 7, 'always': True})
    stubs.answer('python', {'sleep': 0.2})
    assert stubs.run('supervise.sh', *FAST, '--watch_maintenance', '--', 'python')[0] == 0


def test_dry_run_prints_what_would_run(stubs, as_commands, hard_args):
    _, out, _ = stubs.run('supervise.sh', '--dry_run', '--', 'python', *hard_args)
    assert not stubs.calls
    [printed] = as_commands(out)
    if printed[0] == 'setpriv':
        printed = printed[2:]
    stubs.run('supervise.sh', '--', 'python', *hard_args)
    assert stubs.calls == [printed] == [['python', *hard_args]]
