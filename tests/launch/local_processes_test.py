import signal

import pytest

MAIN = ['python', '-m', 'tarflow_jax.main']
FAST = ['--wait=0', '--grace=1']


def by_id(records):
    return sorted(records, key=lambda record: int(record['env']['JAX_PROCESS_ID']))


def test_environment_and_logs(stubs, hard_args):
    stubs.answer('python', *[{'when': f'PROCESS_ID={i}', 'out': f'line {i}\n'} for i in range(3)])
    code, out, _ = stubs.run('local_processes.sh', 3, '--devices=2', '--port=20123', '--logs=a b',
                             *FAST, '--', *hard_args, XLA_FLAGS='--xla_of_mine')
    assert code == 0 and out == 'line 0\n'
    for i, record in enumerate(by_id(stubs.records)):
        assert record['argv'] == [*MAIN, *hard_args]
        assert record['env'] == {
            'JAX_COORDINATOR_ADDRESS': '127.0.0.1:20123', 'JAX_NUM_PROCESSES': '3',
            'JAX_PROCESS_ID': str(i), 'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': '--xla_of_mine --xla_force_host_platform_device_count=2',
        }
        assert (stubs.folder / 'a b' / f'process_{i}.log').read_text() == f'line {i}\n'


@pytest.mark.parametrize('visible, expected', [({}, ['0', '1']),
                                               ({'CUDA_VISIBLE_DEVICES': '5,7'}, ['5', '7'])])
def test_one_gpu_per_process(stubs, visible, expected):
    stubs.run('local_processes.sh', 2, '--platform=gpu', *FAST, '--', 'a', **visible)
    records = by_id(stubs.records)
    assert [record['env']['CUDA_VISIBLE_DEVICES'] for record in records] == expected
    assert 'XLA_FLAGS' not in records[0]['env'] and 'JAX_PLATFORMS' not in records[0]['env']


@pytest.mark.parametrize('failure', [{'code': 1}, {'code': 75}, {'kill': 9}])
def test_one_failure_ends_the_others_and_all_start_again(stubs, failure):
    stubs.answer('python', {'when': 'PROCESS_ID=0', 'hang': 75}, {'when': 'PROCESS_ID=1', **failure},
                 {'when': 'PROCESS_ID=2', 'hang': 75})
    code, _, _ = stubs.run('local_processes.sh', 3, *FAST, '--', 'a')
    assert code == 0
    records = stubs.records
    assert [len(by_id(records[:3])), len(records)] == [3, 6]
    ports = [{r['env']['JAX_COORDINATOR_ADDRESS'] for r in half} for half in (records[:3], records[3:])]
    assert all(len(port) == 1 for port in ports) and ports[0] != ports[1]


def test_a_process_that_ignores_sigterm_is_killed(stubs):
    stubs.answer('python', {'when': 'PROCESS_ID=0', 'hang': None},
                 {'when': 'PROCESS_ID=1', 'sleep': 0.5, 'code': 3})
    assert stubs.run('local_processes.sh', 2, '--once', *FAST, '--', 'a')[0] == 3
    assert stubs.signals in ([], ['SIGTERM'])


@pytest.mark.parametrize('code', [2, 76])
def test_no_restart_where_it_would_not_help(stubs, code):
    stubs.answer('python', {'when': 'PROCESS_ID=0', 'hang': 75}, {'when': 'PROCESS_ID=1', 'code': code})
    assert stubs.run('local_processes.sh', 2, *FAST, '--', 'a')[0] == code
    assert len(stubs.calls) == 2


def test_gives_up(stubs):
    stubs.answer('python', {'code': 1, 'always': True})
    assert stubs.run('local_processes.sh', 2, '--max_restarts=1', *FAST, '--', 'a')[0] == 1
    assert len(stubs.calls) == 4


@pytest.mark.parametrize('number, code, expected', [
    (signal.SIGTERM, 75, 75), (signal.SIGTERM, 1, 75), (signal.SIGTERM, 0, 0), (signal.SIGINT, 130, 130),
])
def test_signals_reach_all(stubs, number, code, expected):
    stubs.answer('python', *[{'hang': code}] * 3)
    process = stubs.start('local_processes.sh', 3, *FAST, '--', 'a')
    stubs.wait_hanging(3)
    process.send_signal(number)
    assert process.wait(10) == expected
    assert stubs.signals == [number.name] * 3
    assert len(stubs.calls) == 3


def test_no_orphans_when_the_launcher_is_killed(stubs):
    stubs.answer('python', *[{'hang': 75}] * 2)
    process = stubs.start('local_processes.sh', 2, *FAST, '--', 'a')
    stubs.wait_hanging(2)
    process.kill()
    process.wait(10)
    stubs.assert_all_ended()


def test_dry_run_prints_what_would_run(stubs, as_commands, hard_args):
    args = [2, '--port=20123', '--devices=4', '--', *hard_args]
    _, out, _ = stubs.run('local_processes.sh', '--dry_run', *args)
    assert not stubs.calls and not (stubs.folder / 'logs').exists()
    stubs.run('local_processes.sh', *args)
    for printed, record in zip(as_commands(out), by_id(stubs.records), strict=True):
        start = printed.index('env') + 1
        end = printed.index('python')
        assert printed[end:] == record['argv']
        assert dict(word.split('=', 1) for word in printed[start:end]) == record['env']
