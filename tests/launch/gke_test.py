import subprocess

import pytest

yaml = pytest.importorskip('yaml')

BUCKET = '--workdir=gs://b1/flow'
BASE = ['--name=flow', '--image=host/a:1', '--accelerator=tpu-v5-lite-podslice']


def apply(stubs, *flags, args=(BUCKET,)):
    """The manifest that kubectl receives."""
    code, _, err = stubs.run('gke.sh', *flags, '--', *args)
    assert code == 0, err
    [record] = stubs.records
    assert record['argv'][-3:] == ['apply', '-f', '-']
    return yaml.safe_load(record['stdin'])


def parts(manifest):
    [jobs] = manifest['spec']['replicatedJobs']
    job = jobs['template']['spec']
    pod = job['template']['spec']
    [container] = pod['containers']
    return jobs, job, pod, container


@pytest.mark.parametrize('topology, flags, hosts, chips', [
    ('16x16', [], 64, 4), ('2x4', [], 2, 4), ('2x4', ['--chips_per_node=8'], 1, 8), ('2x2', [], 1, 4),
    ('1x1', [], 1, 1), ('4x4x8', [], 32, 4), ('2x2x1', [], 1, 4),
])
def test_hosts(stubs, topology, flags, hosts, chips):
    jobs, job, pod, container = parts(apply(stubs, *BASE, f'--topology={topology}', *flags))
    assert jobs['replicas'] == 1
    assert job['parallelism'] == job['completions'] == hosts
    assert container['resources']['limits'] == {'google.com/tpu': chips}
    assert pod['nodeSelector'] == {
        'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
        'cloud.google.com/gke-tpu-topology': topology,
    }


def test_the_rest_of_the_manifest(stubs):
    manifest = apply(stubs, *BASE, '--topology=2x2', '--max_restarts=7', '--service_account=trainer')
    assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert manifest['metadata'] == {'name': 'flow'}
    assert manifest['spec']['failurePolicy'] == {
        'maxRestarts': 7,
        'rules': [{'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}],
    }
    _, job, pod, container = parts(manifest)
    assert job['backoffLimit'] == 0 and job['completionMode'] == 'Indexed'
    [rule] = job['podFailurePolicy']['rules']
    assert rule == {'action': 'FailJob', 'onExitCodes': {
        'containerName': container['name'], 'operator': 'In', 'values': [2, 76, 130]}}
    assert pod['restartPolicy'] == 'Never' and pod['terminationGracePeriodSeconds'] == 120
    assert pod['serviceAccountName'] == 'trainer' and 'tolerations' not in pod
    assert container['image'] == 'host/a:1'
    assert container['command'] == ['python', '-m', 'tarflow_jax.main']
    # Kubernetes gives 64 MiB there, which the processes of data.workers soon fill.
    assert container['volumeMounts'] == [{'name': 'shared-memory', 'mountPath': '/dev/shm'}]
    assert pod['volumes'] == [{'name': 'shared-memory', 'emptyDir': {'medium': 'Memory'}}]


def test_claim(stubs):
    _, _, pod, container = parts(apply(stubs, *BASE, '--claim=c1', '--topology=2x2'))
    assert container['volumeMounts'][1:] == [{'name': 'workdir', 'mountPath': '/workdir'}]
    assert pod['volumes'][1:] == [{'name': 'workdir', 'persistentVolumeClaim': {'claimName': 'c1'}}]


def test_slices_and_spot(stubs):
    manifest = apply(stubs, *BASE, '--topology=2x4', '--slices=3', '--spot', args=[BUCKET])
    assert manifest['metadata']['annotations'] == {
        'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
    jobs, job, pod, container = parts(manifest)
    assert jobs['replicas'] == 3 and job['completions'] == 2
    assert container['args'] == ['--distributed=on', BUCKET]
    assert pod['nodeSelector']['cloud.google.com/gke-spot'] == 'true'
    assert pod['tolerations'] == [{'key': 'cloud.google.com/gke-spot', 'operator': 'Equal',
                                   'value': 'true', 'effect': 'NoSchedule'}]


def test_arguments_arrive(stubs, hard_args):
    """Kubernetes makes $ of $$, and puts variables in place of $(NAME)."""
    args = [*hard_args, 'two\nlines', 'a\tb', 'yes', '1', 'é & \u20ac']
    args += [f'-{chr(code)}&' for code in (*range(1, 32), *range(127, 160))]
    container = parts(apply(stubs, *BASE, '--claim=c1', '--topology=2x2', args=args))[3]
    assert all('$(' not in arg.replace('$$', '') for arg in container['args'])
    assert [arg.replace('$$', '$') for arg in container['args']] == args


def test_dry_run_prints_what_would_run(stubs, hard_args):
    flags = [*BASE, '--claim=c1', '--topology=2x2', '--namespace=n s']
    _, out, _ = stubs.run('gke.sh', '--dry_run', *flags, '--', *hard_args)
    assert not stubs.calls
    stubs.run('gke.sh', *flags, '--', *hard_args)
    subprocess.run(['bash', '-c', out], env=stubs.env, check=True)
    ran, printed = stubs.records
    assert ran['argv'] == printed['argv'] == ['kubectl', '--namespace=n s', 'apply', '-f', '-']
    assert ran['stdin'] == printed['stdin']


@pytest.mark.parametrize('action, expected', [
    ('logs', ['logs', '--selector=jobset.sigs.k8s.io/jobset-name=flow', '--container=trainer',
              '--prefix', '--tail=-1', '--max-log-requests=10000']),
    ('delete', ['delete', 'jobset', 'flow']),
])
def test_other_actions(stubs, as_commands, action, expected):
    args = ['--name=flow', '--namespace=ns', f'--action={action}']
    _, out, _ = stubs.run('gke.sh', '--dry_run', *args)
    assert not stubs.calls
    assert stubs.run('gke.sh', *args)[0] == 0
    assert stubs.calls == as_commands(out) == [['kubectl', '--namespace=ns', *expected]]


def test_a_failing_kubectl_is_not_hidden(stubs):
    stubs.answer('kubectl', {'code': 3})
    assert stubs.run('gke.sh', *BASE, '--topology=2x2', '--', BUCKET)[0] == 3


def pools(stubs, *flags):
    code, out, err = stubs.run(
        'gke.sh', '--name=flow', '--action=pools', '--cluster=c', '--location=us-central1-b', *flags
    )
    assert code == 0 and not out, err
    return [' '.join(call) for call in stubs.calls]


def test_pools_of_two_slices(stubs):
    flags = '--accelerator=tpu-v5-lite-podslice', '--topology=4x8', '--slices=2', '--spot'
    assert pools(stubs, *flags) == [
        f'gcloud container node-pools create flow-{i} --cluster=c --location=us-central1-b '
        '--machine-type=ct5lp-hightpu-4t --num-nodes=8 --tpu-topology=4x8 --spot' for i in range(2)
    ]


def test_a_pool_of_tpu7x_is_placed_by_a_policy(stubs):
    assert pools(stubs, '--accelerator=tpu7x', '--topology=4x4x4') == [
        'gcloud compute resource-policies create workload-policy flow-4x4x4 --type=HIGH_THROUGHPUT '
        '--accelerator-topology=4x4x4 --region=us-central1',
        'gcloud container node-pools create flow-0 --cluster=c --location=us-central1-b '
        '--machine-type=tpu7x-standard-4t --num-nodes=16 --placement-policy=flow-4x4x4',
    ]


def test_a_slice_of_one_host_needs_no_policy(stubs):
    assert pools(stubs, '--accelerator=tpu7x', '--topology=2x2x1') == [
        'gcloud container node-pools create flow-0 --cluster=c --location=us-central1-b '
        '--machine-type=tpu7x-standard-4t --num-nodes=1',
    ]


@pytest.mark.parametrize('flags, named', [
    (['--accelerator=tpu7x', '--topology=4x4x4', '--cluster=c'], '--location is missing'),
    (['--accelerator=tpu-v4', '--topology=2x2x2', '--cluster=c', '--location=a'], '--accelerator=tpu-v4'),
])
def test_pools_that_cannot_be_made(stubs, flags, named):
    code, _, err = stubs.run('gke.sh', '--name=flow', '--action=pools', *flags)
    assert code == 2 and named in err and not stubs.calls
