"""The configuration: every field with its default, and the objects made from it.

`configs/*.py` start from `default()` and change what differs. A ConfigDict goes no deeper than
this file: everything inside takes plain arguments.
"""

import dataclasses
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict, FieldReference

from tarflow_jax import config_ranges
from tarflow_jax.data import kinds, pipeline, sources
from tarflow_jax.flow.attention import KERNELS, PRECISIONS
from tarflow_jax.flow.condition import Condition
from tarflow_jax.flow.denoising import SOLVERS
from tarflow_jax.flow.flow import TarFlow
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.sampling.generate import Conditions, Denoising
from tarflow_jax.training import optimizer as optimizers
from tarflow_jax.training.corruption import Recipe

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
FEATURE_NETWORKS = ('auto', 'inception', 'efficientnet_lite0')
MOST_STEPS = 2**31 - 1
SAMPLE_FORMATS = ('npz', 'array_record')
SAMPLE_METHODS = ('sequential', 'auto')
MOST_FEATURES = 10_000  # images whose features samples are drawn with
STEP_OF_LEVELS = 0.01  # of iterative denoising, by default (iTARFlow's evaluation)


def _any(value) -> FieldReference:
    """A field whose value may be of several types."""
    return FieldReference(value, field_type=object)


def default() -> ConfigDict:
    """All fields; the values are the recipe's where it has one (paper, section 4 and appendix)."""
    c = ConfigDict()
    c.seed = 0

    c.model = m = ConfigDict()
    m.image_size = _any(28)  # or (height, width), as the next but one
    m.image_channels = 1
    m.patch_size = _any(4)
    m.width = 128
    m.layers_per_block = (4, 4, 4, 4)
    m.num_classes = 10  # 0 is without classes
    m.num_features = 0  # numbers in an image's feature vector; 0 is without features
    m.noise_conditioned = False  # iTARFlow; goes with train.noise 'levels'
    m.head_dim = 64
    m.orders = _any('alternate')  # or a permutation of the patches for each block
    m.scale = 'exp'  # or 'softplus'
    m.scale_limit = _any(None)  # bounds log-scales and shifts
    m.first_token = 'identity'  # or 'start'
    m.volume_preserving = False
    m.dtype = 'float32'  # or 'bfloat16'
    m.residual_dtype = 'float32'  # of the residual stream, as in the official code; or 'bfloat16'
    m.precision = 'highest'  # of float32 products on TPU: or 'high', 'default'
    m.remat = 'none'  # or 'layer', 'dots', 'attention'
    m.unroll = 1  # layers per loop iteration
    m.attention = 'auto'  # the kernel of the chip; or one of flow.attention.KERNELS

    c.mesh = mesh = ConfigDict()  # sizes of the device mesh; -1 for one is the rest
    mesh.data = -1
    mesh.fsdp = 1
    mesh.tensor = 1

    c.data = d = ConfigDict()
    d.source = 'embedded'  # or 'prepared' (a folder by data.prepare), 'idx' (IDX files), 'tfds'
    d.path = ''  # the folder; for tfds its data_dir
    d.name = ''  # of the TFDS builder
    d.train_split = 'train'
    d.test_split = 'test'
    d.expects = ()  # kinds of sets that the stated result is for; see data.kinds
    d.flip = False  # random horizontal flips
    d.workers = 0  # processes that decode; 0 uses threads

    c.train = t = ConfigDict()
    t.batch_size = 256
    t.epochs = 100.0
    t.noise = 'gaussian'  # or 'uniform', 'levels'
    t.noise_std = 0.1  # of the [-1, 1] range; the highest of the levels
    t.lowest_noise_std = 0.01  # of the levels
    t.levels = 'uniform'  # their distribution: or 'uniform_square', 'log_normal'
    t.weight = 'level'  # of an image's loss at its level; see training.corruption.WEIGHTS
    t.label_dropout = 0.1  # of features too
    t.peak_learning_rate = 1e-4
    t.floor_learning_rate = 1e-6
    t.warmup_epochs = 1.0
    t.b1 = 0.9
    t.b2 = 0.95
    t.eps = 1e-8
    t.weight_decay = 1e-4
    t.clip_norm = 1.0  # 0 never clips
    t.ema_decay = 0.9999  # 0 keeps no average
    t.accumulation = 1  # parts a batch is worked through in
    t.stop_after_skipped = 100  # steps in a row whose gradient is not finite
    t.log_every = 50  # steps, as the next three
    t.sample_every = 1000
    t.checkpoint_every = 1000
    t.validate_every = 1000  # and for every checkpoint, in evaluate.batch_size; 0 never validates
    t.validation_images = 1000  # of the test set, and as many of the training set
    t.wandb_project = ''  # metrics and pictures also go to this project of Weights & Biases

    c.sample = s = ConfigDict()
    s.count = 100
    s.batch_size = 100
    s.label = -1  # one class for all samples; -1 goes through the classes
    s.denoise_strength = 1.0  # 0 leaves denoising out
    s.denoise_steps = 0  # of noise-conditioned flows; 0 is one for each 0.01 of train.noise_std
    s.denoise_solver = 'ode'  # or 'sde'
    s.denoise_clip = False  # estimates to [-1, 1]
    s.denoise_precision = 'highest'  # as model.precision; many steps are taken in float32
    s.method = 'sequential'  # or 'auto': as a schedule kept in the workdir says
    s.tolerance = 1e-4  # of 'auto': largest error of an image, in [-1, 1]
    s.format = 'npz'  # one of SAMPLE_FORMATS

    c.guidance = g = ConfigDict()  # the fields of tarflow_jax.Guidance
    g.weight = 0.0
    g.target = 'both'
    g.temperature = 1.0
    g.annealed = False
    g.rule = 'linear'
    g.blocks = _any(None)  # guide only so many blocks, those inverted first

    c.evaluate = e = ConfigDict()
    e.metrics = ('bits_per_dim',)  # any of evaluation.scores.SCORES
    e.batch_size = 200
    e.draws = 1  # noise draws per image
    e.levels = ()  # noise levels of the score 'levels'; () is five from the lowest to the highest
    e.round_trip_images = 32
    e.outliers = o = ConfigDict()
    o.images = 1000  # of each set
    o.source = ''  # one more set, in the fields of data
    o.path = ''
    o.name = ''
    o.split = 'test'
    e.frechet = f = ConfigDict()
    f.network = 'auto'  # 'inception' (FID) if there are weights, else 'efficientnet_lite0'
    f.weights = ''  # pt_inception-2015-12-05-6726825d.pth
    f.references = ('train_flipped', 'train')  # or files of statistics: .npz, .pth
    f.samples = ''  # a finished set of samples; empty draws config.sample
    f.statistics = ''  # where statistics are kept; empty is WORKDIR/statistics
    f.neighbours = 10_000  # images of each kind for precision and recall
    f.batch_size = 100

    c.report = r = ConfigDict()  # the page that --mode=report writes
    r.after_training = True
    r.rows = 10  # of samples, one class each
    r.columns = 6
    r.guidance_weights = (0.5, 1.0, 2.0, 4.0)  # beside guidance.weight
    r.training_images = 2000  # among which the neighbours of samples are looked for
    r.test_images = 500  # whose likelihoods are compared
    return c


def variant(arg: str, variants: tuple[str, ...], *, default: str) -> tuple[str, bool]:
    """What stands behind the colon of --config=FILE:ARG, as (variant, whether to `smoke` it)."""
    words = [word for word in arg.split(',') if word]
    chosen = [word for word in words if word != 'smoke']
    for word in chosen:
        if word not in variants:
            raise ValueError(f'config variant {word!r} is none of {", ".join(variants)}, smoke.')
    if len(chosen) > 1:
        raise ValueError(f'config variants {chosen} exclude each other; choose one.')
    return (chosen or [default])[0], 'smoke' in words


def smoke(config: ConfigDict) -> ConfigDict:
    """The config shrunk to seconds on a CPU: its recipe, on embedded images and a tiny flow."""
    c = config
    c.data.update(source='embedded', path='', name='', train_split='train', test_split='test')
    c.data.expects = ()
    c.model.update(image_size=28, image_channels=1, patch_size=4, width=64)
    c.model.layers_per_block = (1, 1)
    c.mesh.update(data=-1, fsdp=1, tensor=1)
    c.model.num_classes = 10 if c.model.num_classes else 0
    c.model.update(num_features=0, orders='alternate')
    c.train.update(batch_size=8, epochs=0.008, warmup_epochs=0.004)
    c.train.update(log_every=2, sample_every=1000, checkpoint_every=1000)
    # As many as evaluate.batch_size: the score bits_per_dim then compiles nothing more.
    c.train.update(validate_every=1000 if c.train.validate_every else 0, validation_images=200)
    c.sample.update(count=20, batch_size=10, method='sequential')
    c.report.update(rows=2, columns=2, guidance_weights=(1.0,), training_images=50, test_images=20)
    return c


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config means: the objects that training, sampling and evaluation work with."""

    model: TarFlow
    recipe: Recipe
    guidance: Guidance
    denoising: Denoising | None
    conditions: Conditions  # of samples

    def on(self, layout) -> 'Plan':
        """The plan with its flow laid out over a mesh; ValueError if it cannot be."""
        named('model', layout.check_attention, self.model)
        layout.check_parameters(self.model)
        return dataclasses.replace(self, model=self.model.clone(layout=layout))

    def with_features_of(self, source) -> 'Plan':
        """The plan whose samples have the features of the source's images, in turn."""
        if not self.model.num_features:
            return self
        count = min(len(source), MOST_FEATURES)
        features = np.stack([source[i]['features'] for i in range(count)])
        conditions = dataclasses.replace(self.conditions, features=features)
        return dataclasses.replace(self, conditions=conditions)

    def with_class_names(self, names) -> 'Plan':
        """The plan whose samples are called by these names of the classes; None has none."""
        named = names if self.model.num_classes else None
        conditions = dataclasses.replace(self.conditions, class_names=named)
        return dataclasses.replace(self, conditions=conditions)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long training goes on, and with which optimizer."""

    steps_per_epoch: int
    total_steps: int
    learning_rate: Callable
    optimizer: optax.GradientTransformation


def plan(config: ConfigDict) -> Plan:
    """Checks every field but those of the data and makes the objects they name.

    Raises:
      ValueError: one sentence that names the field, its value and the remedy.
    """
    config_ranges.check(config, default())
    for field, choices in (
        ('model.dtype', DTYPES), ('model.residual_dtype', DTYPES),
        ('model.attention', ('auto', *KERNELS)),
        ('sample.method', SAMPLE_METHODS), ('sample.format', SAMPLE_FORMATS),
        ('sample.denoise_solver', SOLVERS), ('sample.denoise_precision', PRECISIONS),
        ('evaluate.frechet.network', FEATURE_NETWORKS),
        ('evaluate.outliers.source', ('', *sources.KINDS)),
    ):
        value = operator.attrgetter(field)(config)
        if value not in choices:
            raise ValueError(
                f'{field} {value!r:.100} is none of {", ".join(filter(None, choices))}.'
            )
    for kind in config.data.expects:
        if kinds.plain(kind) not in kinds.NAMES:
            raise ValueError(
                f'data.expects {kind!r:.100} is no kind of set; there are {", ".join(kinds.NAMES)}.'
            )
    fields = config.model.to_dict()
    for field in ('dtype', 'residual_dtype'):
        fields[field] = DTYPES[fields[field]]
    del fields['attention']  # a field of the layout
    fields['layers_per_block'] = tuple(fields['layers_per_block'])
    model = named('model', TarFlow, **fields)
    t, s = config.train, config.sample
    recipe = named('train', Recipe, **{
        field.name: t[field.name] for field in dataclasses.fields(Recipe)
    })
    if model.noise_conditioned != (recipe.noise == 'levels'):
        raise ValueError(
            f"train.noise {recipe.noise!r} does not go with model.noise_conditioned "
            f"{model.noise_conditioned}; 'levels' is for noise-conditioned flows, and they need it."
        )
    guidance = named('guidance', Guidance, **config.guidance.to_dict())
    named('guidance', guidance.check, model, Condition(labels=(), features=()))
    if s.label >= max(model.num_classes, 1):
        raise ValueError(
            f'sample.label {s.label} is outside 0..{model.num_classes - 1}, the classes of the '
            'model; -1 goes through all of them.'
        )
    if recipe.noise == 'levels':
        _check_levels(config.evaluate.levels, recipe)
    conditions = Conditions(
        model.num_classes, s.label, recipe.noise_std if model.noise_conditioned else None
    )
    return Plan(model, recipe, guidance, _denoising(recipe, s), conditions)


def named(section: str, function: Callable, *args, **kwargs):
    """Calls a function of the library, whose errors begin with the name of an argument.

    Raises:
      ValueError: the function's, beginning with the config's field.
    """
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise ValueError(f'{section}.{error}') from error


def _check_levels(levels, recipe: Recipe) -> None:
    """ValueError unless these are noise levels that the flow has seen in training."""
    low, high = recipe.lowest_noise_std, recipe.noise_std
    if recipe.levels == 'log_normal':
        low, high = 0.0, math.inf
    for level in levels:
        if not low <= level <= high:
            raise ValueError(
                f'evaluate.levels {tuple(levels)} must hold numbers from train.lowest_noise_std '
                f'{recipe.lowest_noise_std} to train.noise_std {recipe.noise_std}, the levels of '
                'training.'
            )


def _denoising(recipe: Recipe, s: ConfigDict) -> Denoising | None:
    if not recipe.gaussian_noise_std or not s.denoise_strength:
        return None
    if recipe.noise == 'gaussian':
        return Denoising(recipe.noise_std, s.denoise_strength)
    highest, lowest = recipe.noise_std, recipe.lowest_noise_std
    steps = s.denoise_steps or max(1, int(highest / STEP_OF_LEVELS + 1e-6))
    levels = tuple(np.linspace(highest, lowest, steps).tolist())
    return Denoising(
        levels=levels, solver=s.denoise_solver, clip=s.denoise_clip, precision=s.denoise_precision
    )


def source(config: ConfigDict, split: str, model: TarFlow):
    """The 'train' or 'test' images, checked against the model.

    Raises:
      ValueError or FileNotFoundError: if they are not there, damaged or of another shape.
    """
    d = config.data
    if d.source == 'embedded' and (d.path or d.name):
        field = 'path' if d.path else 'name'
        raise ValueError(
            f"data.{field} {d[field]!r:.200} has no meaning with data.source 'embedded'; set "
            'data.source to prepared, idx or tfds, or leave it out.'
        )
    opened = sources.load(
        d.source, d[f'{split}_split'], path=d.path, name=d.name,
        verify=(jax.process_index(), jax.process_count()),
    )
    sources.check(
        opened,
        image_size=model.image_size,
        channels=model.image_channels,
        num_classes=model.num_classes,
        num_features=model.num_features,
        every_class=split == 'train',
        what=f'the {split} set of data.source {d.source!r}',
    )
    return opened


def schedule(config: ConfigDict, training_images) -> Schedule:
    """The steps and the optimizer for a training set.

    Raises:
      ValueError: if the batch or the epochs do not fit the set.
    """
    t = config.train
    if t.batch_size % t.accumulation:
        raise ValueError(
            f'train.batch_size {t.batch_size} is not a multiple of train.accumulation '
            f'{t.accumulation}; choose one that divides it.'
        )
    steps_per_epoch = named('train', pipeline.steps_per_epoch, training_images, t.batch_size)
    if t.epochs * steps_per_epoch > MOST_STEPS:
        raise ValueError(
            f'train.epochs {t.epochs:g} are more than {MOST_STEPS} steps of {t.batch_size} images; '
            'choose fewer.'
        )
    total_steps = round(t.epochs * steps_per_epoch)
    warmup_steps = round(t.warmup_epochs * steps_per_epoch)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f'train.warmup_epochs {t.warmup_epochs} are {warmup_steps} steps, which leave none of '
            f'{total_steps} for the rest; lower train.warmup_epochs or raise train.epochs.'
        )
    learning_rate = optimizers.learning_rate_schedule(
        peak=t.peak_learning_rate,
        floor=t.floor_learning_rate,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
    )
    return Schedule(
        steps_per_epoch, total_steps, learning_rate, optimizer(config, learning_rate)
    )


def optimizer(config: ConfigDict, learning_rate: Callable) -> optax.GradientTransformation:
    """The config's optimizer under a learning rate, a function of the number of updates."""
    t = config.train
    return named(
        'train',
        optimizers.adamw,
        learning_rate,
        b1=t.b1,
        b2=t.b2,
        eps=t.eps,
        weight_decay=t.weight_decay,
        clip_norm=t.clip_norm,
    )
