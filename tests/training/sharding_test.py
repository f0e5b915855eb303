"""The mesh, the tables of rules, each process's rows, and cores as devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny_flow import perturbed, tiny

import tarflow_jax as tfj
from tarflow_jax.flow.attention import causal_attention
from tarflow_jax.flow.parameters import Parameter
from tarflow_jax.sampling.schedule import BlockSchedule
from tarflow_jax.training import sharding
from tarflow_jax.training.optimizer import adamw
from tarflow_jax.training.state import abstract_state


def state_of(**fields):
    fields = dict(width=256, head_dim=32, num_classes=8) | fields
    return abstract_state(tiny((2, 1), **fields), adamw(lambda k: 1e-3), ema=True)


@pytest.mark.parametrize('given, sizes', [
    (dict(), (8, 1, 1)),
    (dict(fsdp=8), (1, 8, 1)),
    (dict(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
    (dict(data=1, tensor=-1), (1, 1, 8)),
])
def test_mesh_sizes(given, sizes):
    mesh = sharding.make_mesh(**given)
    assert dict(mesh.shape) == dict(zip(('data', 'fsdp', 'tensor'), sizes))


@pytest.mark.parametrize('given, says', [
    (dict(data=3), '^data 3, fsdp 1, tensor 1 do not fit 8 device'),
    (dict(fsdp=3), 'fsdp 3, tensor 1 do not fit 8 device'),
    (dict(fsdp=-1), 'one may be -1'),
    (dict(tensor=0), 'tensor 0 are invalid; each must be at least 1'),
    (dict(fsdp=16), 'whose product is 8'),
])
def test_mesh_refuses(given, says):
    with pytest.raises(ValueError, match=says):
        sharding.make_mesh(**given)


def test_slices_are_joined_by_the_data_axis(monkeypatch):
    class Device:
        platform = 'tpu'
        device_kind = 'TPU v5 lite'
        process_index = 0

        def __init__(self, i):
            self.id, self.slice_index, self.coords = i, i // 4, [i % 2, i % 4 // 2, 0]
            self.core_on_chip = 0

    devices = [Device(i) for i in range(8)]
    for fsdp in (1, 4):
        mesh = sharding.make_mesh(fsdp=fsdp, devices=devices)
        slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
        assert mesh.devices.shape == (8 // fsdp, fsdp, 1)
        assert (slices[: 4 // fsdp] == 0).all() and (slices[4 // fsdp :] == 1).all()
    with pytest.raises(ValueError, match='^data 1 cannot span 2 slices, and only .* choose a multiple of 2'):
        sharding.make_mesh(data=1, fsdp=8, devices=devices)


def test_every_leaf_of_a_train_state_has_a_rule():
    mesh = sharding.make_mesh(2, 2, 2)
    everything = dict(num_features=3, noise_conditioned=True, first_token='start')
    for fields in (dict(), dict(num_classes=0), dict(volume_preserving=True), everything):
        found = sharding.shardings(state_of(**fields), mesh)
        params, layer = found.params['block_0'], found.params['block_1']['layers']
        assert layer['qkv']['kernel'].spec == P(None, 'fsdp', None, 'tensor', None)
        assert layer['mlp_out']['kernel'].spec == P(None, ('tensor', 'fsdp'), None)
        assert params['proj_out']['kernel'].spec == P(('fsdp', 'tensor'), None)
        # Averages and moments are split as their parameters.
        assert found.ema_params == found.params
        assert found.opt_state[1][0].mu == found.opt_state[1][0].nu == found.params
        assert found.step.spec == found.opt_state[1][0].count.spec == P()


def test_arrays_that_no_flow_has_are_refused():
    mesh = sharding.make_mesh(2, 2, 2)
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    for path in ('lora/kernel', 'proj_in/kernels', 'xproj_in/kernel', 'layers/proj/kernel', 'kernel'):
        tree = x
        for word in reversed(path.split('/')):
            tree = {word: tree}
        with pytest.raises(ValueError, match=f'block_0/{path} is no parameter of a flow'):
            sharding.shardings({'block_0': tree}, mesh)
    assert sharding.shardings({'proj_in': {'kernel': x}}, mesh)


@pytest.mark.parametrize('axis', sharding.PARAMETER_AXES)
def test_every_axis_needs_a_line_in_the_table(monkeypatch, axis):
    fields = dict(num_features=3, noise_conditioned=True, first_token='start')
    state = state_of(**fields)  # before the table changes
    fewer = {name: axes for name, axes in sharding.PARAMETER_AXES.items() if name != axis}
    monkeypatch.setattr(sharding, 'PARAMETER_AXES', fewer)
    says = f"axis '{axis}' is not in sharding.PARAMETER_AXES; add it"
    with pytest.raises(ValueError, match=says):
        sharding.shardings(state.params, sharding.make_mesh(2, 2, 2))
    with pytest.raises(ValueError, match=says):
        layout = sharding.Layout(sharding.make_mesh(2, 2, 2))
        layout.gather(jnp.zeros((2, 2)), (axis, 'other'))


def test_all_axes_of_a_flow_are_in_the_tables():
    flow = tiny(num_features=3, noise_conditioned=True, first_token='start')
    axes = {
        axis for p in jax.tree.leaves(flow.parameters(), is_leaf=lambda x: isinstance(x, Parameter))
        for axis in p.axes
    }
    assert axes == set(sharding.PARAMETER_AXES)


def test_what_cannot_be_split_is_named():
    says = r'class_embedding \(8, 256\): its axis of 256 is not divisible by fsdp 3 x tensor 1 of'
    mesh = sharding.make_mesh(1, 3, 1, devices=jax.devices()[:3])
    with pytest.raises(ValueError, match=says):
        sharding.shardings(state_of().params, mesh)
    mesh = sharding.make_mesh(1, 1, 8)
    with pytest.raises(ValueError, match=r'attention_proj/kernel .* its axis of 4 is not divisible by .*tensor 8 of the mesh'):
        sharding.shardings(state_of(head_dim=64).params, mesh)


@pytest.mark.parametrize('sizes', [(1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)])
def test_state_per_device_falls_by_fsdp_times_tensor(sizes):
    def held(state):
        return sum(s.sharding.shard_shape(s.shape) != () and np.prod(s.sharding.shard_shape(s.shape))
                   * s.dtype.itemsize for s in jax.tree.leaves(state))

    state = sharding.placed(state_of(), sharding.make_mesh(*sizes))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    for part, all_of_it in (
        (held(state), whole),
        (held(state.params), whole / 4),
        (held((state.opt_state[1][0].mu, state.opt_state[1][0].nu)), whole / 2),
    ):
        assert part == pytest.approx(all_of_it / (sizes[1] * sizes[2]), rel=0.05)


def test_gathered_parameters_keep_the_tensor_axis():
    model = tiny((2, 1), width=256, head_dim=32, num_classes=8)
    params, axes = state_of().params['block_0'], model.parameters()['block_0']
    mesh = sharding.make_mesh(2, 2, 2)
    layout = sharding.Layout(mesh)

    def is_gathered_to(spec, *names):
        array, parameter = params, axes
        for name in names:
            array, parameter = array[name], parameter[name]
        gather = jax.jit(lambda x: layout.gather(x, parameter.axes))
        found = gather(jnp.zeros(array.shape)).sharding
        return found.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), len(array.shape))

    assert is_gathered_to(P(None, None, None, 'tensor'), 'layers', 'qkv', 'kernel')
    assert is_gathered_to(P(None, 'tensor'), 'layers', 'mlp_out', 'kernel')
    assert is_gathered_to(P(None, None), 'proj_in', 'kernel')
    assert not is_gathered_to(P(None, 'fsdp'), 'layers', 'mlp_out', 'kernel')


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2), (1, 1, 8), (1, 4, 2)])
def test_batches_are_split_over_data_and_fsdp(sizes):
    mesh = sharding.make_mesh(*sizes)
    images = np.arange(16).reshape(16, 1)
    assert sharding.local_rows(mesh, 16).tolist() == list(range(16))
    batch = sharding.to_devices({'image': images, 'mask': np.ones(16)}, mesh, 16)
    np.testing.assert_array_equal(batch['image'], images)
    shards = {s.device: s.data.ravel().tolist() for s in batch['image'].addressable_shards}
    size = 16 // (sizes[0] * sizes[1])
    for i, device in enumerate(mesh.devices.reshape(-1)):
        first = i // sizes[2] * size
        assert shards[device] == list(range(first, first + size))


def test_a_tree_of_host_arrays_is_split_and_numbers_stay():
    mesh = sharding.make_mesh(2, 2, 2)
    condition = tfj.Condition(np.arange(8, dtype=np.int32), np.float32(0.3), np.ones((8, 5), 'f4'))
    found = sharding.split(condition, mesh)
    for x in (found.labels, found.features):
        assert x.sharding == sharding.batch_sharding(mesh)
        assert x.addressable_shards[0].data.shape[0] == 2
    np.testing.assert_array_equal(found.labels, condition.labels)
    assert found.noise_std is condition.noise_std


def test_a_process_gets_the_rows_of_its_devices(monkeypatch):
    # As on a TPU slice, where the mesh goes through the chips of several hosts in turn.
    mesh = sharding.make_mesh(4, 1, 2)
    own = {0: [0, 1], 2: [4, 5]}  # mesh positions along data -> rows of a batch of 8

    class Half:
        def __init__(self, where):
            self._where = where

        def addressable_devices_indices_map(self, shape):
            places = self._where.devices_indices_map(shape)
            keep = {d for i in own for d in mesh.devices[i].flat}
            return {d: index for d, index in places.items() if d in keep}

    original = sharding.batch_sharding
    monkeypatch.setattr(sharding, 'batch_sharding', lambda mesh: Half(original(mesh)))
    assert sharding.local_rows(mesh, 8).tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize('kernel', ['xla', 'splash_interpreted', 'whole_head_interpreted'])
def test_attention_on_a_mesh(kernel):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (4, 2, 128, 16)) for key in keys)
    scale = jnp.array([0.25, 0.5, 0.25, 1.0]).reshape(4, 1, 1, 1)
    layout = sharding.Layout(sharding.make_mesh(2, 2, 2), kernel)

    def result(attend):
        out, pull = jax.vjp(lambda *x: attend(*x, scale), q, k, v)
        return (out, *pull(g))

    wanted = jax.jit(lambda: result(lambda *x: causal_attention('xla', *x)))()
    for found, want in zip(jax.jit(lambda: result(layout.causal_attention))(), wanted):
        np.testing.assert_allclose(found, want, atol=3e-6 * np.abs(want).max())


def test_batch_sizes_are_checked():
    mesh = sharding.make_mesh(2, 2, 2)
    sharding.check(mesh, 8, 'train.batch_size', parts=2)
    with pytest.raises(ValueError, match='train.batch_size 12 is not .* 4 devices times 2 parts; '
                                         'choose a multiple of 8'):
        sharding.check(mesh, 12, 'train.batch_size', parts=2)
    assert [sharding.round_up(n, mesh) for n in (1, 4, 5)] == [4, 4, 8]


def test_sizes_with_no_optimizer_state():
    found = sharding.shardings(
        abstract_state(tiny((1,)), optax.sgd(0.1), ema=False), sharding.make_mesh()
    )
    assert found.ema_params is None and jax.tree.leaves(found.opt_state) == []


COUNT_DEVICES = """
import os
os.sched_getaffinity = lambda pid: set(range({cores}))
from tarflow_jax.training import sharding
sharding.use_cores_as_devices({batch_size})
import jax
print(jax.device_count())
"""


@pytest.mark.parametrize('cores, batch_size, flags, count', [
    (6, 32, '', 4),
    (64, 128, '', 8),
    (4, 8, '--xla_force_host_platform_device_count=3', 3),
])
def test_number_of_devices_divides_the_batch(cores, batch_size, flags, count):
    ran = subprocess.run(
        [sys.executable, '-c', COUNT_DEVICES.format(cores=cores, batch_size=batch_size)],
        env={**os.environ, 'XLA_FLAGS': flags}, capture_output=True, text=True, timeout=60,
        check=True,
    )
    assert int(ran.stdout) == count


def test_the_one_image_of_a_mesh_that_does_not_converge_is_drawn_sequentially():
    model = tiny((1, 1))
    variables = perturbed(model)
    noise = jax.random.normal(jax.random.key(1), (8, 16, 8))
    labels = np.arange(8, dtype=np.int32) % 3
    _, info = tfj.sample(
        model, variables, noise, labels, method='gs_jacobi', segments=2, return_info=True
    )
    second_slowest, slowest = np.sort(info.iterations[1])[-2:]
    assert second_slowest < slowest
    mesh = sharding.make_mesh(devices=jax.devices()[:8])
    images, info = tfj.sample(
        model.clone(layout=sharding.Layout(mesh)),
        jax.device_put(variables, sharding.replicated(mesh)),
        *jax.device_put((noise, labels), sharding.batch_sharding(mesh)),
        method='auto',
        schedule=tfj.Schedule((
            BlockSchedule(2, tolerance=1e-4),
            BlockSchedule(2, tolerance=1e-4, max_iterations=int(second_slowest)),
        )),
        return_info=True,
    )
    assert np.sum(info.sequential) == 1
    failed = int(np.argmax(info.sequential))
    np.testing.assert_array_equal(np.asarray(info.iterations)[:, failed], 15)
    wanted = tfj.sample(model, variables, noise, labels)
    assert np.abs(images - wanted).max() < 5e-4
    np.testing.assert_allclose(images[failed], wanted[failed], atol=1e-5)
