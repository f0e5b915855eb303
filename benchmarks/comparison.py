"""Code shared by the benchmarks: sizes, equal weights on both sides, interleaved timing, devices."""

import argparse
import os
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import tarflow_jax as tfj
from tarflow_jax.data.cores import available_cores

SIZES = {
    'toy': dict(
        image_size=28, image_channels=1, patch_size=4, width=128, layers_per_block=(4,) * 4,
        num_classes=10,
    ),
    'color32': dict(
        image_size=32, image_channels=3, patch_size=4, width=256, layers_per_block=(4,) * 4,
        num_classes=10,
    ),
    # The flow of configs/imagenet64.py:cond, whose imports a minimal installation lacks.
    'imagenet64': dict(
        image_size=64, image_channels=3, patch_size=2, width=768, layers_per_block=(8,) * 8,
        num_classes=1000, residual_dtype=jnp.float32,  # as in the official code's autocast
    ),
    'tiny': dict(
        image_size=8, image_channels=3, patch_size=2, width=64, layers_per_block=(1, 1),
        num_classes=10,
    ),
}
TORCH_DEVICES = {'cpu': 'cpu', 'gpu': 'cuda'}
# Dense bfloat16 FLOP/s from NVIDIA's data sheets, by a part of the card's name; the first match counts.
CARDS = {
    'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'H200': 989e12, 'B200': 2250e12,
    'A100': 312e12, 'L40S': 362e12, 'L4': 121e12,
}


def arguments(description: str, repeats: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--official', help='a checkout of github.com/apple/ml-tarflow to compare with')
    parser.add_argument('--size', choices=SIZES, default='toy')
    parser.add_argument('--repeats', type=int, default=repeats)
    parser.add_argument('--device', choices=TORCH_DEVICES, default='cpu', help='of both sides')
    return parser


def use(device: str, shared: bool = True) -> None:
    """Chooses JAX's device. Call before its backend starts.

    Args:
      shared: whether PyTorch uses the same card. If not, JAX may use almost all of its memory.
    """
    if device == 'gpu':
        os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false' if shared else 'true')
        os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.95')
    jax.config.update('jax_platforms', {'cpu': 'cpu', 'gpu': 'cuda,cpu'}[device])


def our_model(size: str, device: str = 'cpu') -> tfj.TarFlow:
    fields = SIZES[size]
    # Unrolled layers run 10 to 20% faster on a CPU than a loop over layers.
    return tfj.TarFlow(**fields, unroll=max(fields['layers_per_block']) if device == 'cpu' else 1)


def random_variables(model: tfj.TarFlow):
    """Returns initial weights plus noise, so that no part of the flow is an identity.

    The noise is smaller for wider flows, whose samples would otherwise be infinite.
    """
    images = np.zeros((1, *model.image_shape), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    amount = np.float32(0.01 * min(1.0, 256 / model.width))
    rng = np.random.default_rng(0)
    move = lambda x: x + amount * rng.standard_normal(x.shape, np.float32)  # noqa: E731
    return jax.tree.map(move, variables)


def official_model(checkout: str, model: tfj.TarFlow, variables, device: str = 'cpu'):
    """Builds the PyTorch model of the checkout with our weights, with one thread per core."""
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
        num_blocks=len(model.layers_per_block),
        layers_per_block=model.layers_per_block[0],
        num_classes=model.num_classes,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'model.safetensors')
        tfj.save_official(variables, model, path)
        missing, unexpected = theirs.load_state_dict(safetensors.torch.load_file(path), strict=False)
    assert not unexpected and all('attn_mask' in name for name in missing), (missing, unexpected)
    return theirs.to(TORCH_DEVICES[device])


def random_labels(rng, model: tfj.TarFlow, count: int) -> np.ndarray:
    return rng.integers(0, model.num_classes, count).astype(np.int32)


def in_turn(functions: dict, repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Times the functions alternately, because machine speed drifts; returns seconds of each call.

    It alternates between forward and reverse order, because the preceding function may affect the
    time. Every function must wait for its own result.
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
    """Returns the median of the ratios of calls that are adjacent in time."""
    return round(statistics.median(a / b for a, b in zip(seconds, to)), 3)


def interleaved(ours, theirs, repeats: int, warm_up: int = 2) -> dict:
    """Returns the median seconds of both functions and their ratio; either may be None."""
    given = {'ours': ours, 'official': theirs}
    functions = {name: function for name, function in given.items() if function}
    seconds = in_turn(functions, repeats, warm_up)
    result = {f'{name}_seconds': round(statistics.median(s), 4) for name, s in seconds.items()}
    if len(functions) == 2:
        result['ratio'] = ratio(seconds['ours'], seconds['official'])
    return result


def error(found, wanted) -> float:
    """Returns the largest difference over the largest magnitude; NaN if any number is NaN."""
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    return float(f'{np.abs(found - wanted).max() / np.abs(wanted).max():.3g}')


def card() -> str | None:
    """Returns the name of the GPU; None on a CPU."""
    device = jax.devices()[0]
    return device.device_kind if device.platform == 'gpu' else None


def utilisation(flops_per_second: float, name: str | None) -> float | None:
    """Returns the fraction of the card's peak; None if CARDS lacks the card."""
    peak = next((peak for key, peak in CARDS.items() if name and key in name), None)
    return peak and round(flops_per_second / peak, 3)


def versions(with_official: bool) -> dict:
    found = {'jax': jax.__version__}
    if name := card():
        found |= {'card': name}
    else:
        found |= {'cores': available_cores(), 'devices': jax.device_count()}
    if with_official:
        import torch

        found['torch'] = torch.__version__
    return found
