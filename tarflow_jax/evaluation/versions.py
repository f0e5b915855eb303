"""The software versions that produced a number or an image."""

import importlib.metadata
import platform

import tarflow_jax

PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'grain', 'pillow')


def versions() -> dict[str, str]:
    """Returns the versions of Python, this package and the packages its results depend on."""
    return {
        'python': platform.python_version(),
        'tarflow_jax': tarflow_jax.__version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }
