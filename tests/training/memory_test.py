"""What a config needs at least, and what the devices have."""

import jax
import numpy as np
import pytest

from tarflow_jax.flow.flow import TarFlow
from tarflow_jax.training import memory, sharding
from tarflow_jax.training.optimizer import adamw
from tarflow_jax.training.state import abstract_state

MODEL = TarFlow(
    image_size=16, image_channels=1, patch_size=4, width=64, head_dim=16, layers_per_block=(2, 3),
    num_classes=5,
)


def laid_out(model=MODEL, **sizes):
    mesh = sharding.make_mesh(**sizes)
    return model.clone(layout=sharding.Layout(mesh)), mesh


def test_bytes_of_parameters_are_those_of_the_state():
    for sizes in ({}, {'fsdp': 4}, {'fsdp': 2, 'tensor': 2}):
        model, mesh = laid_out(**sizes)
        state = abstract_state(model, adamw(lambda k: 0.1), ema=True)
        places = sharding.shardings(state.params, mesh)
        on_a_device = sum(
            4 * int(np.prod(place.shard_shape(leaf.shape)))
            for leaf, place in zip(jax.tree.leaves(state.params), jax.tree.leaves(places))
        )
        assert memory.of_parameters(model, mesh) == on_a_device
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert memory.parameter_count(MODEL) == whole


def test_training_needs_what_the_backward_pass_starts_from():
    model, mesh = laid_out(data=1, fsdp=8)
    parameters = memory.of_parameters(model, mesh)
    inputs = 5 * 4 * 16 * 64 * 4  # layers, images of this device in a part, patches, width, float32
    logits = 4 * 16**2
    assert memory.of_training(model, mesh, 64, ema=True, accumulation=2) == (
        5 * parameters + inputs + logits
    )
    assert memory.of_training(model, mesh, 64, ema=False, accumulation=2) == (
        4 * parameters + inputs + logits
    )


def test_sampling_needs_the_cache_of_the_deepest_block():
    model, mesh = laid_out()
    noise, cache = 3 * 16 * 16 * 4, 3 * 16 * 2 * 3 * 64 * 4
    assert memory.of_sampling(model, mesh, 24) == memory.of_parameters(model, mesh) + noise + cache


def test_what_the_devices_cannot_hold_is_refused(monkeypatch):
    model, mesh = laid_out()
    monkeypatch.setattr(memory, '_host_memory', lambda: 8 * 2**30)
    assert memory.device_memory(mesh) == 2**30
    assert memory.check(5 * 2**20, model, mesh, 'training') == 'at least 5 MiB of 1.0 GiB on each device'
    with pytest.raises(ValueError) as error:
        memory.check(3 * 2**30, model, mesh, 'training (train.batch_size 9)')
    assert str(error.value) == (
        'training (train.batch_size 9) needs at least 3.0 GiB on each device for a flow of '
        f'{memory.parameter_count(MODEL):,} parameters (model.image_size 16, image_channels 1, '
        'patch_size 4, width 64, layers_per_block (2, 3), num_classes 5, num_features 0), and a '
        'device (cpu) has 1.0 GiB; choose smaller sizes, a smaller batch, or more devices and a '
        'larger mesh.fsdp.'
    )


def test_limits_of_containers_count(monkeypatch, tmp_path):
    limit = tmp_path / 'memory.max'
    monkeypatch.setattr(memory, '_CGROUP', (str(limit), str(tmp_path / 'none')))
    whole = memory._host_memory()
    limit.write_text('max\n')
    assert memory._host_memory() == whole
    limit.write_text('1048576\n')
    assert memory._host_memory() == 2**20
