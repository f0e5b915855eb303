"""Times the sampler against the official one: `python benchmarks/sampling.py --official=PATH`.

Both use the same noise and labels. On a CPU in float32, it prints one line of JSON with three
cases: 100 images without guidance, 100 with guidance weight 2, and one image without guidance. Each
core is a device, as with the command line; with `--plain` there is one device, as in a program that
only imports the package.

With `--device=gpu --size=imagenet64 --dtype=bfloat16` it samples 64 images on a GPU and prints a
line after each case: sequential, guided, Jacobi iteration, and the schedule from `calibrate`
('auto'). The weights are random, so the number of parallel iterations does not predict that of
trained flows. The official code runs under autocast, as in its evaluation.
"""

import json

import comparison
import jax
import jax.numpy as jnp
import numpy as np

import tarflow_jax as tfj
from tarflow_jax.training import sharding

# images, guidance weight, method
CASES = {
    'cpu': ((100, 0.0, 'sequential'), (100, 2.0, 'sequential'), (1, 0.0, 'sequential')),
    'gpu': (
        (64, 0.0, 'sequential'), (64, 2.3, 'sequential'), (64, 0.0, 'jacobi'), (64, 0.0, 'auto'),
    ),
}
FEW = {'tiny': 4}  # images, instead of those of the cases
TOLERANCE = {'float32': 1e-4, 'bfloat16': 0.01}


class OurSampler:
    """Samples images [B, H, W, C], with the batch sharded over as many devices as divide it."""

    def __init__(self, model, variables, noise, labels, weight: float, method: str = 'sequential'):
        devices = max(n for n in range(1, jax.device_count() + 1) if len(noise) % n == 0)
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        self._model = model
        self._variables = jax.device_put(variables, sharding.replicated(mesh))
        self._noise, self._labels = jax.device_put((noise, labels), sharding.batch_sharding(mesh))
        tolerance = TOLERANCE[jnp.dtype(model.dtype).name]
        self._options = {'guidance': tfj.Guidance(weight=weight), 'method': method}
        self.schedule = None
        if method == 'auto':
            self.schedule = tfj.calibrate(
                model, self._variables, self._labels, batch_size=len(noise),
                guidance=self._options['guidance'], tolerance=tolerance,
            )
            self._options['schedule'] = self.schedule
        elif method != 'sequential':
            self._options['tolerance'] = tolerance

    def __call__(self):
        images = tfj.sample(
            self._model, self._variables, self._noise, self._labels, **self._options
        )
        return np.asarray(images)


def official_sampler(theirs, model, noise, labels, weight: float, dtype: str, device: str):
    import torch

    p, place = model.patch_size, comparison.TORCH_DEVICES[device]
    # Within a patch, the official order is (channel, row, column), ours (row, column, channel).
    noise = noise.reshape(*noise.shape[:2], p, p, -1).transpose(0, 1, 4, 2, 3).reshape(noise.shape)
    noise = torch.from_numpy(noise.copy()).to(place)
    labels = torch.from_numpy(labels).long().to(place)
    autocast = torch.autocast(place, torch.bfloat16, enabled=dtype == 'bfloat16')

    @torch.no_grad()
    def run():
        with autocast:
            images = theirs.reverse(noise.clone(), labels, guidance=weight)
        return images.float().cpu().numpy().transpose(0, 2, 3, 1)

    return run


def compared(args, model, variables, official, case) -> dict:
    """Times one case; the official sampler has only one method."""
    images, weight, method = case
    images = FEW.get(args.size, images)
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((images, *model.token_shape)).astype(np.float32)
    labels = comparison.random_labels(rng, model, images)
    ours, theirs = OurSampler(model, variables, noise, labels, weight, method), None
    found = {'images': images, 'guidance': weight, 'method': method}
    if official and method == 'sequential':
        theirs = official_sampler(official, model, noise, labels, weight, args.dtype, args.device)
        found['difference'] = comparison.error(ours(), theirs())
        if args.dtype == 'float32' and args.device == 'cpu':
            assert found['difference'] < 1e-4, f'the samples differ by {found["difference"]}'
    if ours.schedule:
        found['schedule'] = [block.method for block in ours.schedule.blocks]
    found |= comparison.interleaved(ours, theirs, args.repeats, 1 if args.device == 'gpu' else 2)
    return found | {'seconds_per_image': round(found['ours_seconds'] / images, 4)}


def main():
    parser = comparison.arguments(__doc__, repeats=10)
    parser.add_argument('--plain', action='store_true', help='one device for all cores')
    parser.add_argument('--dtype', choices=TOLERANCE, default='float32')
    parser.add_argument('--methods', default='sequential', help='methods, separated by commas')
    args = parser.parse_args()
    comparison.use(args.device)
    if args.device == 'cpu' and not args.plain:
        sharding.use_cores_as_devices(100)
    model = comparison.our_model(args.size, args.device)
    variables = comparison.random_variables(model)
    official = args.official and comparison.official_model(args.official, model, variables, args.device)
    model = model.clone(dtype=jnp.dtype(args.dtype))
    about = {'what': 'sampling', 'size': args.size, 'dtype': args.dtype}
    about |= comparison.versions(bool(official))
    cases = CASES['gpu' if args.size in FEW else args.device]
    cases = [case for case in cases if case[2] in args.methods.split(',')]
    run = lambda case: compared(args, model, variables, official, case)  # noqa: E731
    if args.device == 'gpu' or args.size in FEW:
        for case in cases:
            print(json.dumps(about | run(case)), flush=True)
    else:
        print(json.dumps(about | {'cases': [run(case) for case in cases]}))


if __name__ == '__main__':
    main()
