"""Every field with values that make no sense: refused in one sentence, or taken; nothing else.

A mode's function checks, and returns the work without doing it.
"""

import itertools
import logging
import time

import pytest
from command_line import ROOT, flags

from tarflow_jax import commands, config_ranges, main

FIELDS = {
    name: value for name, value in main._fields().items() if not isinstance(value, dict)
}
# By what a field holds; each is refused for all fields of that kind.
NONSENSE = {
    'a whole number': [
        'nan', '-7', '1.5', '', 'ü€', '99999999999999999999', '((1,),)', 'None,', '{}', '("a",)',
        'True,', 'x' * 5000,
    ],
    'a number': [
        'nan', '-inf', '1e308', '-1', '', 'ü€', '((1,),)', '{"a": 1}', '("a",)', 'True,', 'x' * 5000
    ],
    'True or False': ['2', 'yes', '', '()', 'ü€', 'nan'],
    'a word': ['a\nb', 'x' * 5000, '\x00'],
    'words': ['(1,)', '(None,)', '((1,),)', '(True,)', '("a\\nb",)'],
    "'alternate', or one permutation of the patches per block": [
        '0', 'None', '(1,)', '((1.5,),)', 'zigzag', '1e308', '((0, 0),)'
    ],
}
# Taken or refused.
ANYTHING = [
    '0', '1', '-1', 'inf', '1e-30', '65536', '2147483647', 'abc', '()', '(3,3)', '[1]', 'None',
    'True', '😀',
]


def outcome(given: list[str], mode: str = 'train') -> str | None:
    """None if the command would start its work, else the sentence that it is refused with."""
    start = time.perf_counter()
    try:
        parsed = main._parse(['main', *given, f'--mode={mode}'])
        commands.MODES[mode](parsed.config, parsed)
        return None
    except (ValueError, OSError) as error:
        sentence = main._one_line(error)
    finally:
        assert time.perf_counter() - start < 30
    assert sentence.isprintable() and len(sentence) < 1000
    return sentence


def cases(values):
    for field, default in FIELDS.items():
        for value in values.get(config_ranges.kind_of(field, default), ()):
            yield field, value


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def refused(field, value, given, mode='train') -> None:
    sentence = outcome([*given, f'--config.{field}={value}'], mode)
    assert sentence is not None, f'{field}={value!r} in {mode}'
    assert field in sentence or field.rpartition('.')[2] in sentence, sentence


def test_nonsense_is_refused(images, tmp_path):
    given = flags(tmp_path / 'run', images)
    tried = 0
    for field, default in FIELDS.items():
        # A different two for each field of a kind; the slow tests have all.
        values = NONSENSE[config_ranges.kind_of(field, default)]
        for k in (tried, tried + 1):
            refused(field, values[k % len(values)], given)
        tried += 1
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('field, value, says', [
    ('model.num_classes', '10000000000', 'must be at least 0 and below 2147483648'),
    ('model.num_classes', '2000000000', 'the flow alone needs at least 238 GiB on each device for a '
     'flow of 64,000,0'),
    ('model.width', '64000000000', 'must be at least 1 and below 2147483648'),
    ('model.width', '640000', 'parameters (model.image_size 16, image_channels 1, patch_size 8, '
     'width 640000, layers_per_block (1,), num_classes 5, num_features 0), and a device (cpu) has'),
    ('model.layers_per_block', '(1000000000,)', 'choose smaller sizes, a smaller batch, or more'),
    ('model.layers_per_block', '()', 'must have at least one block'),
    ('model.layers_per_block', '(True,)', '(True,) must hold whole numbers, each at least 1'),
    ('model.head_dim', '0', 'model.head_dim 0 must be at least 1'),
    ('model.attention', 'splash', "attention 'splash' runs on TPUs, but the devices are CPUs"),
    ('model.attention', 'splash_interpreted', 'needs a multiple of 128 patches, but the model has 4'),
    ('mesh.tensor', '3', 'tensor 3 do not fit 8 device(s)'),
    ('train.epochs', '1e308', 'must be above 0 and finite'),
    ('train.epochs', '1e30', 'is more than 2147483647 steps of 16 images; choose fewer'),
    ('data.workers', '1000', 'data.workers 1000 are too many for'),
    ('data.flip', 'yes', "config.data.flip='yes' must be True or False"),
    ('evaluate.metrics', 'bits_per_dim,classification',
     """is one word; write '("bits_per_dim","classification")', in quotes."""),
    ('evaluate.frechet.references', '(1,)', '(1,) must be a tuple of words'),
    ('sample.denoise_steps', '100000', 'must be at least 0 and below 10001'),
])
def test_what_was_taken_or_traced_back(images, tmp_path, field, value, says):
    assert says in outcome([*flags(tmp_path / 'run', images), f'--config.{field}={value}'])


def test_huge_samples_and_batches(trained, images):
    given = flags(trained, images)
    sentence = outcome([*given, '--config.sample.count=2147483647'], 'sample')
    if sentence:  # else the disk holds 550 GB
        assert 'sample.count 2147483647 need 550 GB, but the file system of' in sentence
    huge = ['--config.sample.count=2147483647', '--config.sample.batch_size=2147483647']
    assert 'sampling (sample.batch_size 2147483647) needs at least' in outcome(
        [*given, *huge], 'sample'
    )


def test_data_that_would_be_ignored(tmp_path):
    given = [f'--config={ROOT}/configs/imagenet64.py:smoke', f'--workdir={tmp_path}/run']
    assert "data.path '/my/images' has no effect with data.source 'embedded'" in outcome(
        [*given, '--config.data.path=/my/images']
    )


def test_config_files_with_other_fields(images, tmp_path):
    path = tmp_path / 'own.py'
    for line, says in (
        ('c.model.widht = 64', "the config has the unknown field model.widht; did you mean 'model."),
        ('del c.report', 'the config has no report; start'),
        ('c.train.unlock(); del c.train["epochs"]', 'the config has no train.epochs; start from'),
        ('c.unlock(); del c["mesh"]; c.mesh = 3', 'mesh 3 must be a section'),
    ):
        path.write_text(
            'from tarflow_jax import config\n\n\ndef get_config():\n    c = config.default()\n'
            f'    {line}\n    return c\n'
        )
        sentence = outcome([f'--config={path}', f'--workdir={tmp_path}/run'])
        assert sentence and says in sentence, (line, sentence)


@pytest.mark.slow
def test_all_nonsense_in_all_modes(trained, images, tmp_path):
    new, old = flags(tmp_path / 'run', images), flags(trained, images)
    by_field = {}
    for field, value in cases(NONSENSE):
        refused(field, value, new)
        by_field.setdefault(field, []).append(value)
    count = sum(map(len, by_field.values()))
    for field, values in by_field.items():
        for mode, value in zip(('sample', 'evaluate', 'report', 'convert'), values):
            more = [f'--output={tmp_path}/out.safetensors'] * (mode == 'convert')
            refused(field, value, [*old, *more], mode)
            count += 1
    for field, value in itertools.product(FIELDS, ANYTHING):
        outcome([*new, f'--config.{field}={value}'])
        count += 1
    assert count > 1500
