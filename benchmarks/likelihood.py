"""Times likelihoods, and the official code's beside them: `python benchmarks/likelihood.py --official=PATH`.

log p(x) of a batch in float32 on a CPU, one forward pass, from which bits/dim and classification are
made. Prints one line of JSON.
"""

import json

import comparison
import jax
import numpy as np

import tarflow_jax as tfj
from tarflow_jax.training import sharding

BATCH = {'toy': 200, 'color32': 50}


def our_likelihood(model, variables, images, labels):
    mesh = sharding.make_mesh()
    variables = jax.device_put(variables, sharding.replicated(mesh))
    images, labels = jax.device_put((images, labels), sharding.batch_sharding(mesh))
    run = jax.jit(lambda images: tfj.log_prob(model, variables, images, labels))
    return lambda: np.asarray(run(images))


def official_likelihood(theirs, images, labels):
    """From the two terms that the official model returns, of which its script makes bits."""
    import torch

    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(labels).long()

    @torch.no_grad()
    def run():
        z, _, logdet = theirs(images, labels)
        numbers = z[0].numel()
        square = 0.5 * z.pow(2).sum((1, 2))
        return (logdet * numbers - square - 0.5 * np.log(2 * np.pi) * numbers).numpy()

    return run


def main():
    args = comparison.arguments(__doc__, repeats=10).parse_args()
    batch = BATCH[args.size]
    sharding.use_cores_as_devices(batch)
    model = comparison.our_model(args.size)
    variables = comparison.random_variables(model)
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (batch, *model.image_shape)).astype(np.float32)
    labels = rng.integers(0, comparison.CLASSES, batch).astype(np.int32)
    ours, theirs = our_likelihood(model, variables, images, labels), None
    if args.official:
        official = comparison.official_model(args.official, model, variables)
        theirs = official_likelihood(official, images, labels)
        assert np.allclose(ours(), theirs(), rtol=1e-5), 'the likelihoods differ'
    result = comparison.interleaved(ours, theirs, args.repeats)
    print(json.dumps({'size': args.size, 'batch': batch} | result | comparison.versions(bool(theirs))))


if __name__ == '__main__':
    main()
