"""The range of every number of a config, and the one place that checks them.

Limits that depend on another field are checked where both are known.
"""

import operator

import numpy as np
from ml_collections import ConfigDict

# Intervals as mathematics writes them. Of a tuple they hold for each entry; a field may be None if
# that is its default.
WHOLE = {
    '[-1, inf)': ('mesh.data', 'mesh.fsdp', 'mesh.tensor', 'sample.label'),
    '[0, inf)': (
        'model.num_classes', 'model.num_features', 'data.workers', 'sample.denoise_steps',
    ),
    '[0, 4294967296)': ('seed',),
    '[1, inf)': (
        'model.image_size', 'model.image_channels', 'model.patch_size', 'model.width',
        'model.layers_per_block', 'model.head_dim', 'model.unroll', 'train.batch_size',
        'train.accumulation', 'train.stop_after_skipped', 'train.log_every', 'train.sample_every',
        'train.checkpoint_every', 'sample.count', 'sample.batch_size', 'guidance.blocks',
        'evaluate.batch_size', 'evaluate.draws', 'evaluate.round_trip_images',
        'evaluate.outliers.images', 'evaluate.frechet.neighbours', 'evaluate.frechet.batch_size',
        'report.rows', 'report.columns', 'report.training_images', 'report.test_images',
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


def check(config: ConfigDict) -> None:
    """Checks every number of a config.

    Raises:
      ValueError: one sentence that names a field outside its range, its value and the range.
    """
    for ranges, types in ((WHOLE, (int,)), (REAL, (int, float))):
        for interval, fields in ranges.items():
            for field in fields:
                _check(field, operator.attrgetter(field)(config), interval, types)


def _check(field: str, value, interval: str, types: tuple[type, ...]) -> None:
    entries = value if isinstance(value, tuple | list) else (value,)
    if value is None or all(isinstance(x, types) and _within(x, interval) for x in entries):
        return
    kind = 'whole number' if types == (int,) else 'number'
    if entries is value:
        must = f'hold {kind}s, each'
    else:
        must = 'be' if isinstance(value, types) else f'be a {kind}'
    raise ValueError(f'{field} {value} must {must} {_in_words(interval, types)}.')


def _within(x, interval: str) -> bool:
    # In float32, as it is computed with: 1e39 is infinite there, and 1e-50 is 0.
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
