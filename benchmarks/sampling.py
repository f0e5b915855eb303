"""Times the sequential sampler, and the official one beside it: `python benchmarks/sampling.py --official=PATH`.

float32 on a CPU, from the same noise and labels. Prints one line of JSON with three cases: 100
images without guidance, 100 with guidance of weight 2, one image without. Each core is a device of
its own, as the command line has it; with `--plain` there is one device, as in a program that only
imports the package.
"""

import json

import comparison
import jax
import numpy as np

import tarflow_jax as tfj
from tarflow_jax.training import sharding

CASES = ((100, 0.0), (100, 2.0), (1, 0.0))


def our_sampler(model, variables, noise, labels, weight: float):
    """A function that draws the images [B, H, W, C], the batch split over as many devices as divide it."""
    devices = max(n for n in range(1, jax.device_count() + 1) if len(noise) % n == 0)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    variables = jax.device_put(variables, sharding.replicated(mesh))
    noise, labels = jax.device_put((noise, labels), sharding.batch_sharding(mesh))
    guidance = tfj.Guidance(weight=weight)
    return lambda: np.asarray(tfj.sample(model, variables, noise, labels, guidance=guidance))


def official_sampler(theirs, model, noise, labels, weight: float):
    import torch

    p = model.patch_size
    # Inside a patch the official order is (channel, row, column), ours (row, column, channel).
    noise = noise.reshape(*noise.shape[:2], p, p, -1).transpose(0, 1, 4, 2, 3).reshape(noise.shape)
    noise, labels = torch.from_numpy(noise.copy()), torch.from_numpy(labels).long()

    @torch.no_grad()
    def run():
        images = theirs.reverse(noise.clone(), labels, guidance=weight)
        return images.numpy().transpose(0, 2, 3, 1)

    return run


def main():
    parser = comparison.arguments(__doc__, repeats=10)
    parser.add_argument('--plain', action='store_true', help='one device, whatever the cores')
    args = parser.parse_args()
    if not args.plain:
        sharding.use_cores_as_devices(100)
    model = comparison.our_model(args.size)
    variables = comparison.random_variables(model)
    rng = np.random.default_rng(1)
    official = args.official and comparison.official_model(args.official, model, variables)
    cases = []
    for images, weight in CASES:
        noise = rng.standard_normal((images, *model.token_shape)).astype(np.float32)
        labels = rng.integers(0, comparison.CLASSES, images).astype(np.int32)
        ours = our_sampler(model, variables, noise, labels, weight)
        theirs = official and official_sampler(official, model, noise, labels, weight)
        if theirs:
            a, b = ours(), theirs()
            error = np.abs(a - b).max() / np.abs(b).max()
            assert error < 1e-4, f'the samples differ by {error}'
        result = comparison.interleaved(ours, theirs, args.repeats)
        cases.append({'images': images, 'guidance': weight} | result)
    about = {'size': args.size, 'cases': cases}
    print(json.dumps(about | comparison.versions(bool(official))))


if __name__ == '__main__':
    main()
