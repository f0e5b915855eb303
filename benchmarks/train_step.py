"""Times the train step against the official one: `python benchmarks/train_step.py --official=PATH`.

A step is noise, label dropout, forward, loss, backward and AdamW, without averaging and clipping.
Both sides use float32, or bfloat16 with `--dtype=bfloat16` (the official code by autocast, as in
its training). It prints one line of JSON.

With `--device=gpu` it runs on a GPU, where memory is limited. Each side has its own process
(`--side=ours` or `--side=official`) and uses the largest power of two that fits as the batch size,
or `--batch=N`. `--compile` runs the official step through torch.compile. The first losses of both
sides must agree, because they start from the same weights and images.
"""

import json
import statistics

import comparison
import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow.block import REMAT_POLICIES
from tarflow_jax.training import optimizer as optimizers
from tarflow_jax.training import sharding, state, step
from tarflow_jax.training.corruption import Recipe
from tarflow_jax.training.metrics import model_flops

BATCH = {'toy': 256, 'color32': 32, 'imagenet64': 64, 'tiny': 8}
# XLA allocates new memory for all temporaries at every step (1.4 GiB per device at 256 images), and the
# page faults take a quarter of its CPU time. Four microbatches need a quarter of the memory.
PARTS = {'toy': 4}
LEARNING_RATE = 1e-4


def random_batch(model, count: int) -> dict:
    rng = np.random.default_rng(1)
    return {
        'image': rng.integers(0, 256, (count, *model.image_shape)).astype(np.uint8),
        'label': comparison.random_labels(rng, model, count),
    }


class OurStep:
    """Runs our train step; each call returns the loss. `bytes` is the memory per device."""

    def __init__(self, model, variables, batch, parts: int):
        mesh = sharding.make_mesh()
        model = model.clone(layout=sharding.Layout(mesh))
        optimizer = optimizers.adamw(lambda k: LEARNING_RATE)
        # Noise and dropout have size 0, so that both sides see equal numbers, but are still sampled.
        recipe = Recipe(noise_std=0.0, label_dropout=0.0, ema_decay=0.0, accumulation=parts)
        current = state.from_variables(variables, optimizer, ema=False)
        self._state = jax.device_put(current, sharding.replicated(mesh))
        self._batch = sharding.to_devices(batch, mesh, len(batch['label']))
        self._key = jax.device_put(jax.random.key(0), sharding.replicated(mesh))
        train_step = step.jitted_train_step(self._state, mesh, model, optimizer, recipe)
        self._step = train_step.lower(self._state, self._batch, self._key).compile()
        memory = self._step.memory_analysis()
        self.state_bytes = memory.argument_size_in_bytes
        self.bytes = self.state_bytes + memory.temp_size_in_bytes

    def __call__(self) -> float:
        self._state, metrics = self._step(self._state, self._batch, self._key)
        return float(jax.block_until_ready(metrics)['loss'])


class OfficialStep:
    """Runs the train step of the PyTorch model, like `OurStep`; the model stays on its device."""

    def __init__(self, model, batch, dtype: str, device: str, compile: bool = False):
        import torch

        self._torch, self._device = torch, comparison.TORCH_DEVICES[device]
        autocast = torch.autocast(self._device, torch.bfloat16, enabled=dtype == 'bfloat16')
        self._optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.95), lr=LEARNING_RATE, weight_decay=1e-4
        )
        images = torch.from_numpy(batch['image'].transpose(0, 3, 1, 2).copy())
        self._images = images.to(self._device)
        self._labels = torch.from_numpy(batch['label']).long().to(self._device)

        def loss(x, y):
            with autocast:
                z, _, logdet = model(x, y)
                return model.get_loss(z, logdet)

        self._loss = torch.compile(loss) if compile else loss

    def __call__(self) -> float:
        torch = self._torch
        x = self._images.float() * (2 / 255) - 1
        x = x + 0.0 * torch.randn_like(x)
        dropped = torch.rand(len(self._labels), device=self._device) < 0.0
        self._optimizer.zero_grad()
        loss = self._loss(x, torch.where(dropped, -1, self._labels))
        loss.backward()
        self._optimizer.step()
        return loss.item()


def our_step_that_fits(make, batch: int):
    """Returns `make(n)` for the largest power of two that fits on the device, starting at `batch`.

    It estimates from the memory of the first step how many images fit, and halves the batch if a
    step does not fit.
    """
    limit = (jax.devices()[0].memory_stats() or {}).get('bytes_limit')  # None on a CPU
    guessed = limit is None
    while True:
        found = None
        try:
            found = make(batch)
            if not guessed:
                guessed, fixed = True, 2 * found.state_bytes  # the state, and gradients and updates
                images = (limit - fixed) * batch / max(found.bytes - fixed, found.bytes / 8)
                best = 2 ** int(np.log2(max(images, 1)))
                if best != batch:
                    batch = best
                    continue
            found()
            return found, batch
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error) or batch == 1:
                raise
        guessed, batch = True, batch // 2


def official_step_that_fits(make, batch: int):
    import torch

    while True:
        found = None
        try:
            found = make(batch)
            found()
            return found, batch
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
        found = None
        torch.cuda.empty_cache()
        batch //= 2


def one_side(args, model, variables) -> dict:
    """Measures speed and memory of one side, with the given batch or the largest that fits."""
    parts = args.parts or PARTS.get(args.size, 1)
    if args.side == 'ours':
        fit, variables = our_step_that_fits, jax.device_get(variables)  # a step donates its own
        make = lambda n: OurStep(model, variables, random_batch(model, n), parts)  # noqa: E731
    else:
        official = comparison.official_model(args.official, model, variables, args.device)
        fit = official_step_that_fits
        make = lambda n: OfficialStep(  # noqa: E731
            official, random_batch(model, n), args.dtype, args.device, args.compile
        )
    if args.batch:
        run, batch = make(args.batch), args.batch
    else:
        run, batch = fit(make, BATCH[args.size])
    first_loss = run()
    seconds = comparison.in_turn({'step': run}, args.repeats)['step']
    rate = batch / statistics.median(seconds)
    if args.side == 'ours':
        name, peak = comparison.card(), run.bytes
    elif args.device == 'gpu':
        import torch

        name, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    else:
        name, peak = None, None
    return {
        'side': args.side, 'compile': args.compile, 'remat': model.remat, 'batch': batch,
        'seconds': round(statistics.median(seconds), 4), 'images_per_second': round(rate, 2),
        'mfu': comparison.utilisation(rate * model_flops(model), name),
        'peak_gib': peak and round(peak / 2**30, 2), 'loss_after_fitting': round(first_loss, 6),
    } | ({'card': name} if name else {})


def both_sides(args, model, variables) -> dict:
    size, parts = args.size, args.parts or PARTS.get(args.size, 1)
    count = args.batch or BATCH[size]
    batch, theirs = random_batch(model, count), None
    if args.official:
        official = comparison.official_model(args.official, model, variables, args.device)
        theirs = OfficialStep(official, batch, args.dtype, args.device, args.compile)
    ours = OurStep(model, variables, batch, parts)
    if theirs:
        losses = [(ours(), theirs()) for _ in range(2)]  # the second loss is after one update
        tolerance = {'float32': 1e-5, 'bfloat16': 2e-2}[args.dtype]
        assert np.allclose(*zip(*losses), rtol=tolerance, atol=tolerance), losses
    return {'batch': count, 'parts': parts} | comparison.interleaved(ours, theirs, args.repeats)


def main():
    parser = comparison.arguments(__doc__, repeats=10)
    parser.add_argument('--parts', type=int, help='microbatches per batch')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--side', choices=('both', 'ours', 'official'), default='both')
    parser.add_argument('--batch', type=int, help='batch size, instead of the default')
    parser.add_argument('--compile', action='store_true', help='the official step by torch.compile')
    parser.add_argument('--remat', choices=REMAT_POLICIES, default='none', help='of our step')
    args = parser.parse_args()
    # If only the official side runs, JAX just makes the weights.
    comparison.use('cpu' if args.side == 'official' else args.device, shared=args.side == 'both')
    batch = args.batch or BATCH[args.size]
    if args.device == 'cpu':
        sharding.use_cores_as_devices(batch // (args.parts or PARTS.get(args.size, 1)))
    model = comparison.our_model(args.size, args.device)
    variables = comparison.random_variables(model)
    model = model.clone(dtype=jnp.dtype(args.dtype), remat=args.remat)
    run = both_sides if args.side == 'both' else one_side
    about = {'what': 'train_step', 'size': args.size, 'dtype': args.dtype}
    with_official = bool(args.official) and args.side != 'ours'
    print(json.dumps(about | comparison.versions(with_official) | run(args, model, variables)), flush=True)


if __name__ == '__main__':
    main()
