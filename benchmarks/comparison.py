"""What both benchmarks share: two sizes, the same weights on both sides, interleaved timing."""

import argparse
import os
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

import tarflow_jax as tfj
from tarflow_jax.data.cores import available_cores

SIZES = {
    'toy': dict(image_size=28, image_channels=1, patch_size=4, width=128),
    'color32': dict(image_size=32, image_channels=3, patch_size=4, width=256),
}
BLOCKS = LAYERS = 4
CLASSES = 10


def arguments(description: str, repeats: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--official', help='a checkout of github.com/apple/ml-tarflow to compare with')
    parser.add_argument('--size', choices=SIZES, default='toy')
    parser.add_argument('--repeats', type=int, default=repeats)
    return parser


def our_model(size: str) -> tfj.TarFlow:
    # Unrolled layers run 10 to 20% faster on a CPU than a loop over layers.
    return tfj.TarFlow(
        **SIZES[size], layers_per_block=(LAYERS,) * BLOCKS, num_classes=CLASSES, unroll=LAYERS
    )


def random_variables(model: tfj.TarFlow):
    """Initial weights, moved by noise so that no part of the flow is an identity."""
    images = np.zeros((1, *model.image_shape), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    rng = np.random.default_rng(0)
    move = lambda x: x + 0.01 * rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(move, variables)


def official_model(checkout: str, model: tfj.TarFlow, variables):
    """The PyTorch model of the checkout with our weights, on as many threads as there are cores."""
    sys.path.insert(0, checkout)
    import safetensors.torch
    import torch
    import transformer_flow

    torch.set_num_threads(available_cores())
    theirs = transformer_flow.Model(
        in_channels=model.image_channels,
        img_size=model.image_size,
        patch_size=model.patch_size,
        channels=model.width,
        num_blocks=BLOCKS,
        layers_per_block=LAYERS,
        num_classes=CLASSES,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'model.safetensors')
        tfj.save_official(variables, model, path)
        missing, unexpected = theirs.load_state_dict(safetensors.torch.load_file(path), strict=False)
    assert not unexpected and all('attn_mask' in name for name in missing), (missing, unexpected)
    return theirs


def in_turn(functions: dict, repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of every call of each function; one after another, as the speed of machines drifts.

    Forwards and backwards in turn, as a function may run faster behind some other.
    """
    seconds = {name: [] for name in functions}
    order = list(functions)
    for repeat in range(-warm_up, repeats):
        order.reverse()
        for name in order:
            function = functions[name]
            start = time.perf_counter()
            function()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: list[float], to: list[float]) -> float:
    """The median of the ratios of neighbours in time."""
    return round(statistics.median(a / b for a, b in zip(seconds, to)), 3)


def interleaved(ours, theirs, repeats: int) -> dict:
    """Median seconds of both functions, and their ratio; `theirs` may be None."""
    seconds = in_turn({'ours': ours} | ({'official': theirs} if theirs else {}), repeats)
    result = {f'{name}_seconds': round(statistics.median(s), 4) for name, s in seconds.items()}
    if theirs:
        result['ratio'] = ratio(seconds['ours'], seconds['official'])
    return result


def versions(with_official: bool) -> dict:
    found = {'jax': jax.__version__, 'cores': available_cores(), 'devices': jax.device_count()}
    if with_official:
        import torch

        found['torch'] = torch.__version__
    return found
