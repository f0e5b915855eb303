"""Checks the type of every config field and the range of every number.

Limits that depend on another field are checked elsewhere.
"""

import difflib

import numpy as np
from ml_collections import ConfigDict

# Intervals in mathematical notation. For a tuple they apply to each entry. A field may be None if
# that is its default. JAX counts in 31 bits.
WHOLE = {
    '[-1, 2147483648)': ('mesh.data', 'mesh.fsdp', 'mesh.tensor', 'sample.label'),
    '[0, 2147483648)': ('model.num_classes', 'model.num_features', 'train.validate_every'),
    '[0, 1025)': ('data.workers',),
    '[0, 10001)': ('sample.denoise_steps',),
    '[0, 4294967296)': ('seed',),
    '[1, 101)': ('report.rows', 'report.columns'),
    '[1, 10001)': ('evaluate.draws',),
    '[1, 2147483648)': (
        'model.image_size', 'model.image_channels', 'model.patch_size', 'model.width',
        'model.layers_per_block', 'model.head_dim', 'model.unroll', 'train.batch_size',
        'train.accumulation', 'train.stop_after_skipped', 'train.log_every', 'train.sample_every',
        'train.checkpoint_every', 'train.validation_images', 'sample.count', 'sample.batch_size',
        'guidance.blocks', 'evaluate.batch_size', 'evaluate.round_trip_images',
        'evaluate.outliers.images', 'evaluate.frechet.neighbours', 'evaluate.frechet.batch_size',
        'report.training_images', 'report.test_images',
    ),
}
REAL = {
    '[0, 1)': ('train.noise_std', 'train.label_dropout', 'train.b1', 'train.b2', 'train.ema_decay'),
    '(0, 1)': ('train.lowest_noise_std', 'sample.tolerance'),
    '[0, inf)': (
        'train.warmup_epochs', 'train.peak_learning_rate', 'train.floor_learning_rate',
        'train.weight_decay', 'train.clip_norm', 'sample.denoise_strength', 'guidance.weight',
        'report.guidance_weights',
    ),
    '(0, inf)': (
        'model.scale_limit', 'train.epochs', 'train.eps', 'guidance.temperature', 'evaluate.levels',
    ),
}
PAIRS = ('model.image_size', 'model.patch_size')  # a number, or (height, width)
WORDS = ('data.expects', 'evaluate.metrics', 'evaluate.frechet.references')  # tuples of these
LONGEST = 4096  # characters of a word


def fields(config: dict, prefix: str = '') -> dict:
    """Returns the sections and fields of a config by name, such as 'model' and 'model.width'."""
    found = {}
    for name, value in config.items():
        found[prefix + name] = value
        if isinstance(value, dict):
            found |= fields(value, f'{prefix}{name}.')
    return found


def kind_of(field: str, default) -> str:
    """Describes the type of a field in words, from its default or the tables above."""
    if any(field in names for names in WHOLE.values()):
        return 'a whole number'
    if any(field in names for names in REAL.values()):
        return 'a number'
    if field in WORDS:
        return 'words'
    if field == 'model.orders':
        return "'alternate', or one permutation of the patches per block"
    return 'True or False' if isinstance(default, bool) else 'a word'


def check(config: ConfigDict, default: ConfigDict) -> None:
    """Checks that a config has the fields of the default config, with valid types and ranges.

    Raises:
      ValueError: if not; the message has the field, its value and what it must be.
    """
    wanted, given = fields(default.to_dict()), fields(config.to_dict())
    for field, value in wanted.items():
        if field not in given:
            raise ValueError(
                f'the config has no {field}; start from tarflow_jax.config.default(), which has it.'
            )
        if isinstance(value, dict) and not isinstance(given[field], dict):
            raise ValueError(f'{field} {given[field]!r:.100} must be a section; leave it out.')
    for field in sorted(given.keys() - wanted.keys()):
        close = difflib.get_close_matches(field, wanted, 1)
        hint = f'did you mean {close[0]!r}?' if close else 'tarflow_jax/config.py lists them.'
        raise ValueError(f'the config has the unknown field {field}; {hint}')
    for ranges, types in ((WHOLE, (int,)), (REAL, (int, float))):
        for interval, names in ranges.items():
            for field in names:
                _check_number(field, given[field], wanted[field], interval, types)
    for field in WORDS:
        if not isinstance(given[field], tuple | list) or not all(map(_is_word, given[field])):
            raise ValueError(
                f'{field} {given[field]!r:.100} must be a tuple of words, such as ("one", "two"), '
                'or ().'
            )
    for field, value in wanted.items():
        words, right = kind_of(field, value), True
        if words == 'True or False':
            right = isinstance(given[field], bool)
        elif words == 'a word' and not isinstance(value, dict):
            right = _is_word(given[field])
        elif field == 'model.orders':
            right = given[field] == value or _is_orders(given[field])
        if not right:
            raise ValueError(f'{field} {given[field]!r:.100} must be {words}.')


def _is_word(value) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST and value.isprintable()


def _is_orders(value) -> bool:
    return isinstance(value, tuple | list) and all(
        isinstance(order, tuple | list) and all(type(x) is int for x in order) for order in value
    )


def _check_number(field: str, value, default, interval: str, types: tuple[type, ...]) -> None:
    several = isinstance(value, tuple | list)
    entries = value if several else (value,)
    if isinstance(default, tuple):
        right_form = several
    else:
        right_form = not several or (field in PAIRS and len(value) == 2)
    if right_form and all(type(x) in types and _within(x, interval) for x in entries):
        return
    if value is None and default is None:
        return
    kind = 'whole number' if types == (int,) else 'number'
    if isinstance(default, tuple):
        must = f'hold {kind}s, each'
    elif field in PAIRS:
        must = f'be a {kind}, or (height, width), each'
    else:
        must = 'be' if type(value) in types else f'be a {kind}'
    shown = repr(value) if isinstance(value, str) and not value.isalnum() else str(value)
    raise ValueError(f'{field} {shown:.100} must {must} {_in_words(interval, types)}.')


def _within(x, interval: str) -> bool:
    # Compare as float32, the type of the computation, where 1e39 is infinite and 1e-50 is 0.
    if isinstance(x, float):
        with np.errstate(over='ignore'):
            x = float(np.float32(x))
    low, high = map(float, interval[1:-1].split(','))
    above = x >= low if interval[0] == '[' else x > low
    return above and x < high


def _in_words(interval: str, types: tuple[type, ...]) -> str:
    low, high = interval[1:-1].split(', ')
    above = f'at least {low}' if interval[0] == '[' else f'above {low}'
    if high != 'inf':
        return f'{above} and below {high}'
    return above + (' and finite' if float in types else '')
