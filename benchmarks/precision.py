"""Measures the error of fewer passes: `python benchmarks/precision.py --workdir=DIR`, or `--width=W`.

A TPU multiplies bfloat16. It computes a float32 product, depending on the `precision` of the flow,
as a sum of products of bfloat16 parts, x = hi + mid + lo:

    'default'  1 pass    hi hi
    'high'     3 passes  hi hi + hi lo + lo hi, of two parts
    'highest'  6 passes  hi hi + hi mid + mid hi + mid mid + hi lo + lo hi

This script emulates these products on a CPU, in the forward and the backward pass, and accumulates
in float32. (It does not emulate the order of the sums and the TPU's own exp, log and tanh.) It
prints a line of JSON per precision, and one for a flow in bfloat16, with the differences from plain
float32:

    denoised       largest and root mean square, of iteratively denoised samples in [-1, 1]
    bits_per_dim   largest of an image, and that of the mean over the images
    gradient       |g - g32| / |g32|, of the training loss to all parameters
    z              largest, relative to the largest of float32
    round_trip     largest and root mean square of image to z to image, within the precision

Instead, `--streams` compares the two dtypes of the residual stream of a bfloat16 flow
(`model.residual_dtype`).

`--workdir=DIR` uses the newest checkpoint of a run and its training images. `--width=W` uses an
untrained flow of (4, 4, 4, 24) layers and `--patches` patches with random weights, whose scores are
much smaller than those of a trained flow.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from unittest import mock

import automatic
import comparison
import jax
import jax.numpy as jnp
import numpy as np

import tarflow_jax as tfj
from tarflow_jax.flow.likelihood import training_loss
from tarflow_jax.flow.products import PRECISIONS
from tarflow_jax.training.corruption import Recipe, condition_of, corrupt

PARTS = {'highest': 3, 'high': 2, 'default': 1}  # bfloat16 parts of an operand
PLAIN = jnp.einsum
LEVELS = np.linspace(0.3, 0.01, 30)  # for untrained flows


def parts(x: jax.Array, count: int) -> list[jax.Array]:
    """Splits x into `count` bfloat16 arrays, stored as float32, whose sum approximates x."""
    found = []
    for _ in range(count):
        found.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - found[-1]
    return found


def passes(subscripts: str, a: jax.Array, b: jax.Array, count: int) -> jax.Array:
    """Computes einsum of float32 arrays, and its gradients, as a sum over their parts."""
    of_a, of_b, out = subscripts.replace('->', ',').split(',')

    def summed(subscripts, a, b):
        a, b = parts(a, count), parts(b, count)
        pairs = [(i, j) for i in range(count) for j in range(count - i)]
        pairs.sort(key=sum, reverse=True)  # small products first
        return sum(PLAIN(subscripts, a[i], b[j]) for i, j in pairs)

    @jax.custom_vjp
    def product(a, b):
        return summed(subscripts, a, b)

    def pull(saved, g):
        a, b = saved
        return summed(f'{out},{of_b}->{of_a}', g, b), summed(f'{of_a},{out}->{of_b}', a, g)

    product.defvjp(lambda a, b: (product(a, b), (a, b)), pull)
    return product(a, b)


def einsum(subscripts: str, *operands, precision=None, preferred_element_type=None) -> jax.Array:
    """Replaces `jnp.einsum`."""
    if precision is None:  # for bfloat16, or for one array
        return PLAIN(subscripts, *operands, preferred_element_type=preferred_element_type)
    return passes(subscripts, *operands, PARTS[precision])


@contextlib.contextmanager
def as_on_a_tpu() -> Iterator[None]:
    """Makes the flow compute its products in the passes of their precision."""
    jax.clear_caches()  # removes programs with plain products
    with mock.patch('jax.numpy.einsum', einsum):
        yield
    jax.clear_caches()


class Case:
    """One flow, images of its training set, and samples before denoising."""

    def __init__(self, model, variables, recipe, levels, pixels, labels, count: int):
        self.variables, self.levels = variables, levels
        self.images, noise_std, self.weight = corrupt(jax.random.key(0), pixels, recipe)
        self.condition = condition_of(model, {'label': labels}, noise_std)
        noise = jax.random.normal(jax.random.key(1), (count, *model.token_shape))
        self.drawn_with = condition_of(model, {'label': labels[:count]}, levels[0])
        self.raw = tfj.sample(model, variables, noise, self.drawn_with)

    def measure(self, model) -> dict[str, np.ndarray]:
        """Returns denoised samples, bits/dim of each image, and all gradients as one vector."""

        def loss(variables):
            z, logdet = model.apply(variables, self.images, self.condition)
            return training_loss(z, logdet, self.weight)[0]

        nats = tfj.log_prob(model, self.variables, self.images, self.condition)
        z, _ = jax.jit(model.apply)(self.variables, self.images, self.condition)
        back = tfj.sample(model, self.variables, z, self.condition)
        found = {
            'z': z,
            'round_trip': back - self.images,
            'bits_per_dim': tfj.bits_per_dim(nats, model.num_dims),
            'gradient': jax.flatten_util.ravel_pytree(jax.jit(jax.grad(loss))(self.variables))[0],
        }
        if model.noise_conditioned:
            found['denoised'] = tfj.iterative_denoise(
                model, self.variables, self.raw, self.drawn_with, levels=self.levels
            )
        return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def differences(found: dict, wanted: dict) -> dict:
    bits = found['bits_per_dim'] - wanted['bits_per_dim']
    gradient, of = found['gradient'], wanted['gradient']
    row = {
        'bits_per_dim': [abs(bits).max(), abs(bits.mean())],
        'gradient': np.linalg.norm(gradient - of) / np.linalg.norm(of),
        'z': abs(found['z'] - wanted['z']).max() / abs(wanted['z']).max(),
        'round_trip': _largest_and_rms(found['round_trip']),
    }
    if 'denoised' in found:
        row['denoised'] = _largest_and_rms(found['denoised'] - wanted['denoised'])
    return jax.tree.map(lambda x: float(f'{x:.2g}'), row)


def _largest_and_rms(error: np.ndarray) -> list[float]:
    return [abs(error).max(), np.sqrt(np.square(error).mean())]


def trained(workdir: str, images: int, samples: int) -> tuple[tfj.TarFlow, Case]:
    plan, variables, sets = automatic.newest(workdir)
    chosen = [sets['train'][i] for i in range(images)]
    pixels, labels = (np.stack([one[name] for one in chosen]) for name in ('image', 'label'))
    levels = plan.denoising.levels if plan.model.noise_conditioned else (0.0,)
    return plan.model, Case(
        plan.model, variables, plan.recipe, levels, pixels, labels.astype(np.int32), samples
    )


def untrained(width: int, patches: int, images: int, samples: int) -> tuple[tfj.TarFlow, Case]:
    model = tfj.TarFlow(
        image_size=2 * round(patches**0.5), image_channels=3, patch_size=2, width=width,
        layers_per_block=(4, 4, 4, 24), num_classes=10, noise_conditioned=True,
    )
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, *model.image_shape), np.uint8)
    labels = rng.integers(0, 10, images, np.int32)
    variables = comparison.random_variables(model)
    recipe = Recipe('levels', 0.3)
    return model, Case(model, variables, recipe, LEVELS, pixels, labels, samples)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', help='a run of the command line')
    parser.add_argument('--width', type=int, help='an untrained flow of this width instead')
    parser.add_argument('--patches', type=int, default=64, help='patches of an untrained flow')
    parser.add_argument('--images', type=int, default=64, help='images for likelihoods and gradients')
    parser.add_argument('--samples', type=int, default=16, help='samples to denoise')
    parser.add_argument('--streams', action='store_true', help='compare residual streams')
    args = parser.parse_args()
    if args.width:
        model, case = untrained(args.width, args.patches, args.images, args.samples)
    else:
        model, case = trained(args.workdir, args.images, args.samples)
    model = model.clone(dtype=jnp.float32, remat='none', unroll=1)
    wanted = case.measure(model)

    def show(name: str, found: dict):
        row = {'T': model.num_patches, 'width': model.width, 'precision': name}
        print(json.dumps(row | differences(found, wanted)), flush=True)

    bfloat16 = model.clone(dtype=jnp.bfloat16)
    if args.streams:
        show('float32', wanted)
        show('bfloat16', case.measure(bfloat16.clone(residual_dtype=jnp.bfloat16)))
        show('bfloat16, float32 stream', case.measure(bfloat16.clone(residual_dtype=jnp.float32)))
        return
    show('bfloat16', case.measure(bfloat16))
    with as_on_a_tpu():
        for precision in reversed(PRECISIONS):
            show(precision, case.measure(model.clone(precision=precision)))


if __name__ == '__main__':
    main()
