"""The versions of what made a number or an image."""

import importlib.metadata
import platform

import tarflow_jax

PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'grain', 'pillow')


def versions() -> dict[str, str]:
    """Of Python, this package and those that its results depend on."""
    return {
        'python': platform.python_version(),
        'tarflow_jax': tarflow_jax.__version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }
