"""How many processor cores this process may use."""

import os


def available_cores() -> int:
    """The cores that the operating system lets this process use, or all where it does not say."""
    affinity = getattr(os, 'sched_getaffinity', None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1
