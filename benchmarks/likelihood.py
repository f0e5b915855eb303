"""Times likelihoods against the official code: `python benchmarks/likelihood.py --official=PATH`.

It computes log p(x) of a batch in float32 by one forward pass, the basis of bits/dim and
classification, on a CPU or with `--device=gpu` on a GPU. It prints one line of JSON.
"""

import json

import comparison
import jax
import numpy as np

import tarflow_jax as tfj
from tarflow_jax.training import sharding

BATCH = {'toy': 200, 'color32': 50, 'imagenet64': 16, 'tiny': 4}


def our_likelihood(model, variables, images, labels):
    mesh = sharding.make_mesh()
    variables = jax.device_put(variables, sharding.replicated(mesh))
    images, labels = jax.device_put((images, labels), sharding.batch_sharding(mesh))
    # Pass the weights as an argument; as constants they would become part of the program.
    run = jax.jit(lambda variables, images: tfj.log_prob(model, variables, images, labels))
    return lambda: np.asarray(run(variables, images))


def official_likelihood(theirs, images, labels, device: str):
    """Computes the likelihood from the two terms of the official model, as its script does."""
    import torch

    place = comparison.TORCH_DEVICES[device]
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(place)
    labels = torch.from_numpy(labels).long().to(place)

    @torch.no_grad()
    def run():
        z, _, logdet = theirs(images, labels)
        numbers = z[0].numel()
        square = 0.5 * z.pow(2).sum((1, 2))
        return (logdet * numbers - square - 0.5 * np.log(2 * np.pi) * numbers).cpu().numpy()

    return run


def main():
    args = comparison.arguments(__doc__, repeats=10).parse_args()
    comparison.use(args.device)
    batch = BATCH[args.size]
    if args.device == 'cpu':
        sharding.use_cores_as_devices(batch)
    model = comparison.our_model(args.size, args.device)
    variables = comparison.random_variables(model)
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (batch, *model.image_shape)).astype(np.float32)
    labels = comparison.random_labels(rng, model, batch)
    ours, theirs, found = our_likelihood(model, variables, images, labels), None, {}
    if args.official:
        official = comparison.official_model(args.official, model, variables, args.device)
        theirs = official_likelihood(official, images, labels, args.device)
        found['difference'] = comparison.error(ours(), theirs())
        if args.device == 'cpu':
            assert np.allclose(ours(), theirs(), rtol=1e-5), f'the likelihoods differ: {found}'
    found |= comparison.interleaved(ours, theirs, args.repeats)
    found['images_per_second'] = round(batch / found['ours_seconds'], 2)
    about = {'what': 'likelihood', 'size': args.size, 'batch': batch}
    print(json.dumps(about | found | comparison.versions(bool(theirs))), flush=True)


if __name__ == '__main__':
    main()
