"""Every flag and field that is a path is made absolute, and none is forgotten."""

import types

import pytest

from tarflow_jax import config as configs
from tarflow_jax import config_paths
from tarflow_jax.data import prepare, prepare_flags
from tarflow_jax.main import _TEXT_FLAGS, _fields

# Fields of text that are no paths. A new field of text belongs here or to config_paths.FIELDS.
WORDS = {
    'data.expects', 'data.name', 'data.source', 'data.test_split', 'data.train_split',
    'evaluate.frechet.network', 'evaluate.metrics', 'evaluate.outliers.name',
    'evaluate.outliers.source', 'evaluate.outliers.split', 'guidance.rule', 'guidance.target',
    'model.attention', 'model.dtype', 'model.first_token', 'model.orders', 'model.precision',
    'model.remat', 'model.residual_dtype', 'model.scale', 'sample.denoise_precision',
    'sample.denoise_solver', 'sample.format', 'sample.method', 'train.levels', 'train.noise',
    'train.wandb_project', 'train.weight',
}


def is_text(value) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(entry, str) for entry in value)
    return isinstance(value, str)


def test_every_path_is_known():
    texts = {name for name, value in _fields().items() if is_text(value)} - {'evaluate.levels'}
    assert sorted(config_paths.FIELDS) == sorted(texts - WORDS)
    assert sorted(config_paths.FLAGS) == sorted(_TEXT_FLAGS.keys() - {'profile_steps', 'known'})
    actions = {action.dest: action.type for action in prepare_flags.parser('')._actions}
    texts = {name for name, kind in actions.items() if kind in (None, str)}
    words = {'help', 'strict', 'crop', 'split', 'name', 'rotate', 'background'}
    assert texts - words == set(prepare.PATHS)


def no_flags(**given):
    return types.SimpleNamespace(**(dict.fromkeys(config_paths.FLAGS) | given))


@pytest.mark.parametrize('name', [*config_paths.FLAGS, *config_paths.FIELDS])
def test_each_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', '/home/of')
    section, _, field = name.rpartition('.')

    def resolved(value):
        config, given = configs.default(), no_flags()
        if section:
            config.update_from_flattened_dict({name: value})
        else:
            setattr(given, name, value)
        config_paths.resolve(config, given)
        return getattr(given, name) if not section else config_value(config, name)

    for value, wanted in (('~/x/', '/home/of/x'), ('x', f'{tmp_path}/x'), ('gs://abc/x/', 'gs://abc/x')):
        if name == 'evaluate.frechet.references':
            assert resolved(('train', value)) == ('train', wanted)
        else:
            assert resolved(value) == wanted
    with pytest.raises(ValueError, match=f'^(--)?{name}[ =]gs:/abc/x is neither a path'):
        resolved(('gs:/abc/x',) if name == 'evaluate.frechet.references' else 'gs:/abc/x')


def config_value(config, name):
    for part in name.split('.'):
        config = config[part]
    return config


def test_defaults_stay():
    config, given = configs.default(), no_flags()
    before = config.to_dict()
    config_paths.resolve(config, given)
    assert config.to_dict() == before and given == no_flags()
