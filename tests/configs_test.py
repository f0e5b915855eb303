"""Every config file: its recipe, its parameters, and a run of its smoke variant."""

import ast
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import ROOT, call, metrics
from ml_collections import ConfigDict

from tarflow_jax import config as configs
from tarflow_jax.training.metrics import model_flops
from tarflow_jax.training.state import abstract_state, parameter_count

FILES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
# Batch, epochs, noise, its deviation, guidance weight, temperature, annealed, denoising strength.
RECIPES = {
    'imagenet64:bpd': (256, 100, 'uniform', None, 0, 1.0, False, None),
    'imagenet64:uncond': (256, 200, 'gaussian', 0.05, 0.2, 0.3, False, 1.0),
    'imagenet64:cond': (256, 200, 'gaussian', 0.05, 2.3, 1.0, True, 1.0),
    'imagenet128:cond': (768, 320, 'gaussian', 0.15, 1.5, 1.0, True, 0.97),
    'afhq256:cond': (256, 4000, 'gaussian', 0.07, 3.4, 1.0, True, 1.4),
}
# iTARFlow: highest level, epochs, label dropout, guidance weight, denoising steps.
ITARFLOWS = {
    'itarflow_imagenet64:cond': (0.3, 300, 0.1, 2.1, 30),
    'itarflow_imagenet128:cond': (0.5, 450, 0.1, 3.7, 50),
    'itarflow_imagenet256:cond': (0.7, 600, 0.0, 4.2, 70),
}
CROPPED = ('photographs/torchvision',)
DATA = {
    'imagenet64:bpd': ('data/imagenet64', ('imagenet_resized',)),
    'imagenet64:uncond': ('data/imagenet64', ('imagenet_resized',)),
    'imagenet64:cond': ('data/imagenet64_cropped', CROPPED),
    'imagenet128:cond': ('data/imagenet128', CROPPED),
    'afhq256:cond': ('data/afhq256', CROPPED),
}
# Image size, patch size, width, classes, dtype, parameters; 8 blocks of 8 layers, of an iTARFlow 3
# of 4 and one of 24.
MODELS = {
    'imagenet64:bpd': (64, 2, 768, 0, jnp.float32, 460_142_784),
    'imagenet64:uncond': (64, 2, 768, 0, jnp.bfloat16, 460_142_784),
    'imagenet64:cond': (64, 2, 768, 1000, jnp.bfloat16, 466_286_784),
    'imagenet128:cond': (128, 4, 1024, 1000, jnp.bfloat16, 823_927_552),
    'afhq256:cond': (256, 8, 768, 3, jnp.bfloat16, 463_481_856),
    'itarflow_imagenet64:cond': (64, 2, 1280, 1000, jnp.bfloat16, 771_394_656),
    'itarflow_imagenet128:cond': (128, 4, 1600, 1000, jnp.bfloat16, 1_202_502_784),
    'itarflow_imagenet256:cond': (256, 8, 2176, 1000, jnp.bfloat16, 2_220_731_392),
}
SMOKES = [
    'imagenet64:bpd,smoke', 'imagenet64:uncond,smoke', 'imagenet64:cond,smoke',
    'imagenet128:smoke', 'afhq256:smoke', 'colour64:smoke', 'cifar10:smoke', 'cifar10:cond,smoke',
    'itarflow_imagenet64:smoke', 'itarflow_imagenet128:smoke', 'itarflow_imagenet256:smoke',
]
# Of each kind of flow one; the kinds are those of the first three.
REPORTED = SMOKES[:3]


def module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'configs' / f'{name}.py')
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def get(name):
    file, _, arg = name.partition(':')
    return module(file).get_config(*([arg] if arg else []))


def test_every_file_is_in_these_tables():
    named = {name.partition(':')[0] for name in MODELS}
    named |= {'fashion_mnist', 'itarflow_fashion_mnist', 'colour64', 'cifar10'}
    assert named == set(FILES)


@pytest.mark.parametrize('name', RECIPES)
def test_recipe(name):
    c = get(name)
    batch, epochs, noise, std, weight, temperature, annealed, strength = RECIPES[name]
    assert (c.train.batch_size, c.train.epochs, c.train.noise) == (batch, epochs, noise)
    assert std is None or c.train.noise_std == std
    assert (c.guidance.weight, c.guidance.temperature) == (weight, temperature)
    assert (c.guidance.annealed, c.guidance.rule, c.guidance.target) == (annealed, 'linear', 'both')
    assert strength is None or c.sample.denoise_strength == strength
    t = c.train
    assert (t.peak_learning_rate, t.floor_learning_rate, t.warmup_epochs) == (1e-4, 1e-6, 1.0)
    assert (t.b1, t.b2, t.eps, t.weight_decay, t.label_dropout) == (0.9, 0.95, 1e-8, 1e-4, 0.1)
    assert t.ema_decay > 0 and t.clip_norm > 0
    assert c.data.flip
    assert (c.data.path, tuple(c.data.expects)) == DATA[name]


@pytest.mark.parametrize('name', ITARFLOWS)
def test_recipe_of_an_itarflow(name):
    c = get(name)
    highest, epochs, dropout, weight, steps = ITARFLOWS[name]
    plan, t, g = configs.plan(c), c.train, c.guidance
    assert (t.batch_size, t.epochs, t.label_dropout) == (512, epochs, dropout)
    assert (t.noise, t.noise_std, t.lowest_noise_std) == ('levels', highest, 0.01)
    assert (t.levels, t.weight, t.ema_decay, t.clip_norm) == ('uniform', 'level', 0, 0)
    assert (t.b1, t.b2, t.eps, t.weight_decay, t.accumulation) == (0.9, 0.95, 1e-8, 1e-4, 1)
    assert (g.weight, g.rule, g.target) == (weight, 'linear_sigma', 'both')
    assert (g.annealed, g.blocks, g.temperature) == (True, None, 1.0)
    assert len(plan.denoising.levels) == steps and not plan.denoising.clip
    assert plan.denoising.levels == pytest.approx(np.linspace(highest, 0.01, steps))
    assert plan.denoising.solver == 'ode'
    assert c.data.flip and tuple(c.data.expects) == CROPPED
    schedule = configs.schedule(c, range(1_281_167))
    assert (schedule.steps_per_epoch, schedule.total_steps) == (2502, epochs * 2502)
    # The first update at 1e-5, linear over one epoch, and back down to 1e-5.
    rates = [float(schedule.learning_rate(k)) for k in (0, 1251, 2502, epochs * 2502)]
    assert rates == pytest.approx([1e-5, 5.5e-5, 1e-4, 1e-5], rel=1e-4)


@pytest.mark.parametrize('name', MODELS)
def test_model_and_state(name):
    plan = configs.plan(get(name))
    image_size, patch_size, width, num_classes, dtype, parameters = MODELS[name]
    model = plan.model
    assert (model.image_size, model.image_channels, model.patch_size) == (image_size, 3, patch_size)
    layers = (4, 4, 4, 24) if name in ITARFLOWS else (8,) * 8
    assert (model.width, model.layers_per_block) == (width, layers)
    assert model.noise_conditioned == (name in ITARFLOWS)
    assert (model.num_classes, model.dtype, model.head_dim) == (num_classes, dtype, 64)
    average = plan.recipe.ema_decay > 0
    state = abstract_state(model, configs.optimizer(get(name), lambda k: 1e-4), ema=average)
    assert parameter_count(state) == parameters
    # Two moments and the average are of the same size; four counters come on top.
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert numbers == (3 + average) * parameters + 4
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}


def test_quickstart():
    c = get('fashion_mnist')
    plan = configs.plan(c)
    assert c.data.source == 'embedded'
    assert (plan.model.image_size, plan.model.image_channels, plan.model.num_classes) == (28, 1, 10)
    source = configs.source(c, 'train', plan.model)
    schedule = configs.schedule(c, source)
    assert schedule.steps_per_epoch == 10_000 // c.train.batch_size
    state = abstract_state(plan.model, schedule.optimizer, ema=True)
    assert parameter_count(state) < 5_000_000


@pytest.mark.parametrize('variant, noise, classes', [('bpd', 'uniform', 0), ('cond', 'gaussian', 10)])
def test_cifar10(variant, noise, classes):
    c = get(f'cifar10:{variant}')
    plan = configs.plan(c)
    model = plan.model
    assert model.image_shape == (32, 32, 3) and model.token_shape == (256, 12)
    assert (plan.recipe.noise, model.num_classes) == (noise, classes)
    assert c.data.flip and tuple(c.data.expects) == ('cifar10',)
    state = abstract_state(model, configs.optimizer(c, lambda k: 1e-4), ema=True)
    assert 25e6 < parameter_count(state) < 27e6
    steps = configs.schedule(c, range(50_000)).total_steps
    doc = module('cifar10').__doc__
    assert f'{steps:,} steps' in doc
    assert f'{model_flops(model) * steps * c.train.batch_size:.1e}'.replace('e+', 'e') in doc
    assert get('cifar10') == get('cifar10:bpd')


@pytest.mark.parametrize('name', ['fashion_mnist', 'itarflow_fashion_mnist', *MODELS, *SMOKES])
def test_no_field_that_is_not_in_the_defaults(name):
    def shape(c):
        return {k: shape(v) if isinstance(v, ConfigDict) else type(v) for k, v in c.items()}

    assert shape(get(name)) == shape(configs.default())
    json.dumps(get(name).to_dict())


@pytest.mark.parametrize('file', FILES)
def test_docstring_says_what_to_expect(file):
    doc = ast.get_docstring(ast.parse((ROOT / 'configs' / f'{file}.py').read_text()))
    assert doc
    for name, (*_, parameters) in MODELS.items():
        if name.startswith(f'{file}:'):
            assert f'{parameters / 1e6:.0f}M' in doc


@pytest.mark.parametrize('name', ['imagenet64:mnist', 'imagenet128:bpd', 'afhq256:smoke,x'])
def test_unknown_variant(name):
    with pytest.raises(ValueError, match="config variant '.*' must be one of .*smoke"):
        get(name)


def test_variants_exclude_each_other():
    with pytest.raises(ValueError, match=r"\['bpd', 'cond'\] exclude each other"):
        get('imagenet64:bpd,cond')


def test_variant_by_default():
    assert get('imagenet64') == get('imagenet64:cond')
    assert get('imagenet64:smoke') == get('imagenet64:cond,smoke')
    assert get('imagenet128') == get('imagenet128:cond')


@pytest.mark.slow
@pytest.mark.parametrize('name', SMOKES)
def test_smoke_variant_runs(name, tmp_path):
    file, _, arg = name.partition(':')
    full, smoke = get(f'{file}:{arg.partition(",")[0]}'), get(name)
    assert smoke.train.noise == full.train.noise and smoke.model.dtype == full.model.dtype
    assert smoke.model.noise_conditioned == full.model.noise_conditioned
    code = call(
        f'--config={ROOT}/configs/{file}.py:{arg}', f'--workdir={tmp_path}',
        '--config.train.epochs=0.0016', '--config.train.warmup_epochs=0.0008',
        '--config.evaluate.metrics=()', f'--config.report.after_training={name in REPORTED}',
    )
    assert code == 0
    assert [line['step'] for line in metrics(tmp_path) if 'loss' in line] == [2]
    [validated] = [line for line in metrics(tmp_path) if 'validation/loss' in line]
    assert np.isfinite(list(validated.values())).all()
    sheets = {path.name.split('_')[-1] for path in (tmp_path / 'samples').iterdir()}
    assert ('guided.png' in sheets) == (full.guidance.weight > 0)
    assert ('denoised.png' in sheets) == (full.train.noise != 'uniform')
    if name not in REPORTED:
        return
    report = (tmp_path / 'report.html').read_text()
    assert ('then denoised' in report) == (full.train.noise != 'uniform')
    assert ('T-shirt' in report) == (full.model.num_classes > 0)


def test_schedule_counts_steps():
    c = configs.default()
    c.train.update(batch_size=16, epochs=2.5, warmup_epochs=0.5, peak_learning_rate=1.0)
    schedule = configs.schedule(c, range(100))
    assert (schedule.steps_per_epoch, schedule.total_steps) == (6, 15)
    rates = [float(schedule.learning_rate(k)) for k in range(15)]
    assert rates.index(max(rates)) == 3 and rates[0] == pytest.approx(1e-6)


def test_whole_numbers_for_fields_of_fractions():
    c = configs.default()
    c.train.epochs = 3
    c.guidance.weight = 2
    assert configs.schedule(c, range(1000)).total_steps == 9
    with pytest.raises(TypeError):
        c.train.batch_size = 2.5


@pytest.mark.parametrize('noise, std', [('gaussian', 0.1), ('uniform', 0.0)])
def test_noise_to_remove(noise, std):
    c = configs.default()
    c.train.noise = noise
    plan = configs.plan(c)
    assert plan.recipe.gaussian_noise_std == std
    assert (plan.denoising.noise_std if plan.denoising else 0.0) == std
    c.sample.denoise_strength = 0.0
    assert configs.plan(c).denoising is None


def test_plan_of_a_noise_conditioned_flow():
    c = configs.default()
    c.model.noise_conditioned = True
    c.train.update(noise='levels', noise_std=0.3, lowest_noise_std=0.05, weight='one')
    c.sample.update(denoise_solver='sde', denoise_clip=True, label=2)
    plan = configs.plan(c)
    assert (plan.recipe.noise_std, plan.recipe.lowest_noise_std) == (0.3, 0.05)
    assert plan.recipe.weight == 'one' and plan.recipe.scored_noise_std == 0.05
    # A level for each 0.01 of the highest, from it down to the lowest.
    levels = plan.denoising.levels
    assert len(levels) == 30 and (levels[0], levels[-1]) == pytest.approx((0.3, 0.05))
    assert (plan.denoising.solver, plan.denoising.clip) == ('sde', True)
    condition = plan.conditions.of([4, 5])
    assert condition.labels.tolist() == [2, 2] and condition.noise_std == np.float32(0.3)
    assert condition.features is None
    c.sample.denoise_steps = 3
    assert configs.plan(c).denoising.levels == pytest.approx((0.3, 0.175, 0.05))


def test_samples_have_the_features_of_a_source():
    c = configs.default()
    c.model.num_features = 2
    plan = configs.plan(c)
    source = [{'features': np.float32([i, -i])} for i in range(3)]
    condition = plan.with_features_of(source).conditions.of(np.arange(5))
    np.testing.assert_array_equal(condition.features[:, 0], [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(condition.labels, np.arange(5))
    c.model.num_features = 0
    plan = configs.plan(c)
    assert plan.with_features_of(source) is plan


def test_sizes_may_be_pairs():
    c = configs.default()
    c.model.update(image_size=(48, 32), patch_size=(4, 2))
    model = configs.plan(c).model
    assert model.image_shape == (48, 32, 1) and model.token_shape == (192, 8)
