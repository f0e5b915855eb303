"""Counts the CPU cores that this process may use."""

import os


def available_cores() -> int:
    """Returns the number of cores this process may use; all of them if the system cannot tell."""
    affinity = getattr(os, 'sched_getaffinity', None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1
