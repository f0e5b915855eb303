"""Every number of a config has a range, and the first one outside is named."""

import math

import pytest

from tarflow_jax import config as configs
from tarflow_jax import config_ranges
from tarflow_jax.main import _fields

RANGES = [
    (field, interval, whole)
    for whole, ranges in ((True, config_ranges.WHOLE), (False, config_ranges.REAL))
    for interval, fields in ranges.items() for field in fields
]
# Numbers or None; their default says no type.
OPTIONAL = {'guidance.blocks', 'model.scale_limit'}
WORDS = {'data.expects'}  # which an empty tuple does not say either


def with_value(field, value):
    config = section = configs.default()
    *sections, name = field.split('.')
    for part in sections:
        section = section[part]
    section[name] = (value,) if isinstance(section[name], tuple) else value
    return config


def check(config):
    config_ranges.check(config, configs.default())


def is_numeric(value) -> bool:
    if isinstance(value, tuple):
        return all(is_numeric(x) for x in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def test_every_number_has_one_range():
    numeric = {name for name, value in _fields().items() if is_numeric(value)}
    assert sorted(field for field, *_ in RANGES) == sorted((numeric | OPTIONAL) - WORDS)
    check(configs.default())


@pytest.mark.parametrize('field, interval, whole', RANGES, ids=[field for field, *_ in RANGES])
def test_range(field, interval, whole):
    low, high = map(float, interval[1:-1].split(','))
    step = 1 if whole else 1e-3
    inside = [low if interval[0] == '[' else low + step]
    outside = [low - step] + ([] if interval[0] == '[' else [low])
    if math.isinf(high):
        inside.append(10**6)
    else:
        inside.append(high - step)
        outside += [high, high + step]
    if whole:
        inside, outside = [int(x) for x in inside], [int(x) for x in outside]
    else:
        # Infinite, and 0 or 1, in float32.
        outside += [math.nan, math.inf, -math.inf, 1e39]
        outside += [1e-50] if interval[0] == '(' else []
        outside += [1 - 1e-12] if high == 1 else []
    for value in inside:
        check(with_value(field, value))
    for value in outside:
        with pytest.raises(ValueError) as error:
            configs.plan(with_value(field, value))
        assert str(error.value).startswith((f'{field} {value} must ', f'{field} ({value},) must '))
        assert str(error.value).endswith('.') and '\n' not in str(error.value)
