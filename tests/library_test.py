"""The package inside other people's programs: modules of theirs, transformations, their clocks."""

import ast
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_flow import batch, perturbed, tiny

import tarflow_jax as tfj

ROOT = Path(tfj.__file__).parents[1]


class Scaled(nn.Module):
    """A user's module: a learned contrast in front of a flow, and the density of the whole."""

    flow: tfj.TarFlow

    @nn.compact
    def __call__(self, images, labels=None):
        log_contrast = self.param('log_contrast', nn.initializers.zeros, ())
        z, logdet = self.flow(images * jnp.exp(log_contrast), labels)
        return tfj.latent_log_prob(z, logdet) + self.flow.num_dims * log_contrast


class Head(nn.Module):
    """One that makes its flow itself, in `setup`, beside a layer of its own."""

    def setup(self):
        self.flow = tiny((1,))
        self.out = nn.Dense(5)

    def __call__(self, images, labels=None):
        z, _ = self.flow(images, labels)
        return self.out(z.mean(1))


@pytest.fixture(scope='module')
def flow():
    return tiny((1,))


@pytest.fixture(scope='module')
def variables(flow):
    return perturbed(flow)


def test_flow_as_a_submodule(flow, variables):
    images, labels = batch(flow)
    module = Scaled(flow)
    initial = jax.jit(module.init)(jax.random.key(0), images, labels)
    assert set(initial['params']) == {'flow', 'log_contrast'}
    own = {'params': initial['params']['flow']}
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, variables)

    params = {'flow': variables['params'], 'log_contrast': jnp.float32(0.1)}
    found = jax.jit(module.apply)({'params': params}, images, labels)
    wanted = tfj.log_prob(flow, variables, images * jnp.exp(0.1), labels) + 0.1 * flow.num_dims
    np.testing.assert_allclose(found, wanted, rtol=1e-5)

    @jax.jit
    def loss(params):
        return -module.apply({'params': params}, images, labels).mean()

    gradient = jax.grad(loss)(params)
    step = 1e-2
    low, high = (loss(params | {'log_contrast': 0.1 + s}) for s in (-step, step))
    np.testing.assert_allclose(gradient['log_contrast'], (high - low) / (2 * step), rtol=1e-2)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))

    # What the user's module trained, the functions of this package take.
    noise = jax.random.normal(jax.random.key(1), (3, flow.num_patches, flow.patch_dim))
    np.testing.assert_array_equal(
        tfj.sample(flow, {'params': params['flow']}, noise, labels),
        tfj.sample(flow, variables, noise, labels),
    )


def test_flow_made_in_setup(flow):
    images, labels = batch(flow)
    module = Head()
    found, initial = jax.jit(module.init_with_output)(jax.random.key(0), images, labels)
    assert found.shape == (3, 5)
    assert set(initial['params']) == {'flow', 'out'}


def test_volume_preserving_flow_as_a_submodule():
    flow = tiny((1,), volume_preserving=True)
    images, labels = batch(flow)
    initial = jax.jit(Scaled(flow).init)(jax.random.key(0), images, labels)
    variance = initial['prior']['flow']['variance']
    np.testing.assert_array_equal(variance, np.ones((flow.num_patches, flow.patch_dim)))


def test_vmap_over_flows_and_keys(flow):
    images, labels = batch(flow)
    keys = jax.random.split(jax.random.key(0), 2)
    ensemble = jax.jit(jax.vmap(flow.init, (0, None, None)))(keys, images, labels)
    members = [jax.tree.map(lambda x, i=i: x[i], ensemble) for i in range(2)]

    found = jax.vmap(lambda v: tfj.log_prob(flow, v, images, labels))(ensemble)
    wanted = [tfj.log_prob(flow, v, images, labels) for v in members]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3

    @jax.jit
    def gradients(variables):
        return jax.grad(lambda v: tfj.log_prob(flow, v, images, labels).mean())(variables)

    found, wanted = jax.jit(jax.vmap(gradients))(ensemble), gradients(members[1])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=1e-3)

    @jax.jit
    def draw(key, variables):
        noise = jax.random.normal(key, (2, flow.num_patches, flow.patch_dim))
        return tfj.sample(flow, variables, noise, labels[:2], guidance=tfj.Guidance(weight=1.0))

    found = jax.vmap(draw)(keys, ensemble)
    for i in range(2):
        np.testing.assert_allclose(found[i], draw(keys[i], members[i]), rtol=1e-4, atol=1e-5)


def test_gradient_through_samples(flow, variables):
    """As for guidance by a loss on images, or for a search in latent space."""
    _, labels = batch(flow)
    noise = jax.random.normal(jax.random.key(1), (3, flow.num_patches, flow.patch_dim))
    direction = jax.random.normal(jax.random.key(2), noise.shape)

    @jax.jit
    def brightness(noise):
        return tfj.sample(flow, variables, noise, labels).mean()

    slope = (jax.grad(brightness)(noise) * direction).sum()
    step = 1e-2
    low, high = (brightness(noise + s * direction) for s in (-step, step))
    np.testing.assert_allclose(slope, (high - low) / (2 * step), rtol=2e-2)


PROGRAM = """
import sys, time
import flax
start = time.perf_counter()
import tarflow_jax as tfj
print(time.perf_counter() - start)
print(*(name for name in sys.modules if name.startswith('tarflow_jax')))
tfj.SequenceFlow, tfj.Guidance, tfj.Condition
print(*(name for name in sys.modules if name.startswith('tarflow_jax.')))
tfj.sample, tfj.load_official
print(*(name for name in {heavy} if name in sys.modules))
missing = set(tfj.__all__) - set(dir(tfj)) | {{n for n in tfj.__all__ if not callable(getattr(tfj, n))}}
print(*missing)
"""
HEAVY = (
    'orbax', 'grain', 'tensorflow_datasets', 'array_record', 'optax', 'PIL', 'tensorboardX', 'ml_collections',
    'plotly', 'torch', 'tensorflow', 'tarflow_jax.training', 'tarflow_jax.data', 'tarflow_jax.evaluation',
    'tarflow_jax.config', 'jax.experimental.pallas.ops.tpu.splash_attention',
)


def test_import_loads_little_and_costs_little_beside_flax():
    def run():
        ran = subprocess.run(
            [sys.executable, '-c', PROGRAM.format(heavy=HEAVY)], cwd=ROOT, capture_output=True,
            text=True, timeout=120, check=True,
        )
        return ran.stdout.split('\n')[:-1]

    seconds, nothing, flow, heavy, missing = run()
    assert nothing == 'tarflow_jax'
    # The names of a room load that room, and nothing of those after it.
    assert {name.split('.')[1] for name in flow.split()} == {'flow'}
    assert heavy == missing == ''
    # Other programs on the machine can only lengthen it.
    assert float(seconds) < 0.5 or float(run()[0]) < 0.5


def test_public_names():
    assert list(tfj.__all__) == sorted(tfj.__all__)
    assert set(tfj.__all__) <= set(dir(tfj)) and '__version__' in dir(tfj)
    assert all(callable(getattr(tfj, name)) for name in tfj.__all__)
    with pytest.raises(AttributeError, match="module 'tarflow_jax' has no attribute 'TarFlo'"):
        tfj.TarFlo  # noqa: B018
    assert not hasattr(tfj, 'block_module')


def test_types_and_homes_name_the_same():
    """What type checkers see, and what is imported when it is first used."""
    tree = ast.parse(Path(tfj.__file__).read_text())
    seen = {
        (alias.name, node.module.removeprefix('tarflow_jax.'))
        for branch in tree.body if isinstance(branch, ast.If) for node in branch.body
        for alias in node.names
    }
    assert seen == set(tfj._HOMES.items()) and {name for name, _ in seen} == set(tfj.__all__)
