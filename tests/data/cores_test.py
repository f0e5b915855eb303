"""The number of cores, also where the operating system does not say which may be used."""

import os

import pytest

from tarflow_jax.data import prepare_flags
from tarflow_jax.data.cores import available_cores


def test_as_many_as_may_be_used(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 3, 5}, raising=False)
    assert available_cores() == 3


@pytest.mark.parametrize('count, cores', [(6, 6), (None, 1)])
def test_all_where_it_is_not_known(monkeypatch, count, cores):
    monkeypatch.delattr(os, 'sched_getaffinity', raising=False)  # macOS has none
    monkeypatch.setattr(os, 'cpu_count', lambda: count)
    assert available_cores() == cores
    assert prepare_flags.parser('').parse_args(['x', '--out=y']).workers == cores
