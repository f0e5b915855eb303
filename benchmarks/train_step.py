"""Times the train step, and the official one beside it: `python benchmarks/train_step.py --official=PATH`.

On a CPU: noise, label dropout, forward, loss, backward and AdamW, without average and clipping. In
float32, or with `--dtype=bfloat16` in bfloat16 on both sides (the official code by autocast, as it
trains). Prints one line of JSON.
"""

import functools
import json

import comparison
import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.training import optimizer as optimizers
from tarflow_jax.training import sharding, state, step
from tarflow_jax.training.corruption import Recipe

BATCH = {'toy': 256, 'color32': 32}
# XLA takes fresh memory for all temporaries at every step (1.4 GiB a device at 256 images), and the
# page faults are a quarter of its CPU time; four parts in turn need a quarter of the memory.
PARTS = {'toy': 4, 'color32': 1}
LEARNING_RATE = 1e-4


def random_batch(model, size: str) -> dict:
    rng = np.random.default_rng(1)
    return {
        'image': rng.integers(0, 256, (BATCH[size], *model.image_shape)).astype(np.uint8),
        'label': rng.integers(0, comparison.CLASSES, BATCH[size]).astype(np.int32),
    }


def our_step(model, variables, batch, parts: int):
    """A function that makes one step and returns its loss."""
    mesh = sharding.make_mesh()
    model = model.clone(layout=sharding.Layout(mesh))
    optimizer = optimizers.adamw(lambda k: LEARNING_RATE)
    # No noise and no dropout, so that both sides see the same numbers; both still draw them.
    recipe = Recipe(noise_std=0.0, label_dropout=0.0, ema_decay=0.0, accumulation=parts)
    train_step = jax.jit(
        functools.partial(step.train_step, model=model, optimizer=optimizer, recipe=recipe),
        donate_argnums=0,
    )
    current = state.from_variables(variables, optimizer, ema=False)
    current = jax.device_put(current, sharding.replicated(mesh))
    batch = sharding.to_devices(batch, mesh, len(batch['label']))
    key = jax.device_put(jax.random.key(0), sharding.replicated(mesh))

    def run() -> float:
        nonlocal current
        current, metrics = jax.block_until_ready(train_step(current, batch, key))
        return float(metrics['loss'])

    return run


def official_step(model, batch, dtype: str):
    import torch

    autocast = torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16')
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), lr=LEARNING_RATE, weight_decay=1e-4
    )
    images = torch.from_numpy(batch['image'].transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(batch['label']).long()

    def run() -> float:
        x = images.float() * (2 / 255) - 1
        x = x + 0.0 * torch.randn_like(x)
        y = torch.where(torch.rand(len(labels)) < 0.0, -1, labels)
        optimizer.zero_grad()
        with autocast:
            z, _, logdet = model(x, y)
            loss = model.get_loss(z, logdet)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def main():
    parser = comparison.arguments(__doc__, repeats=10)
    parser.add_argument('--parts', type=int, help='parts a batch is worked through in')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    args = parser.parse_args()
    size, parts = args.size, args.parts or PARTS[args.size]
    sharding.use_cores_as_devices(BATCH[size] // parts)
    model = comparison.our_model(size)
    variables = comparison.random_variables(model)
    model = model.clone(dtype=jnp.dtype(args.dtype))
    batch, theirs = random_batch(model, size), None
    if args.official:
        official = comparison.official_model(args.official, model, variables)
        theirs = official_step(official, batch, args.dtype)
    ours = our_step(model, variables, batch, parts)
    if theirs:
        losses = [(ours(), theirs()) for _ in range(2)]  # the second after one update
        tolerance = {'float32': 1e-5, 'bfloat16': 2e-2}[args.dtype]
        assert np.allclose(*zip(*losses), rtol=tolerance, atol=tolerance), losses
    result = comparison.interleaved(ours, theirs, args.repeats)
    about = {'size': size, 'dtype': args.dtype, 'batch': BATCH[size], 'parts': parts}
    print(json.dumps(about | result | comparison.versions(bool(theirs))))


if __name__ == '__main__':
    main()
