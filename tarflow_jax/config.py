"""The config: every field with its default, and the objects built from it.

`configs/*.py` start from `default()` and change some fields. Only this file and the command line
handle a ConfigDict; all other code takes plain arguments.
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
from tarflow_jax.flow.attention import KERNELS
from tarflow_jax.flow.condition import Condition
from tarflow_jax.flow.denoising import SOLVERS
from tarflow_jax.flow.flow import TarFlow
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.flow.products import PRECISIONS
from tarflow_jax.sampling.generate import Conditions, Denoising
from tarflow_jax.training import optimizer as optimizers
from tarflow_jax.training.corruption import Recipe

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
FEATURE_NETWORKS = ('auto', 'inception', 'efficientnet_lite0')
MOST_STEPS = 2**31 - 1
SAMPLE_FORMATS = ('npz', 'array_record')
SAMPLE_METHODS = ('sequential', 'auto')
MOST_FEATURES = 10_000  # the largest number of images whose features are used for sampling
STEP_OF_LEVELS = 0.01  # default step of iterative denoising (iTARFlow's evaluation)


def _any(value) -> FieldReference:
    """Makes a field whose value may have several types."""
    return FieldReference(value, field_type=object)


def default() -> ConfigDict:
    """Returns all fields with defaults from the recipe in the paper (section 4 and appendix)."""
    c = ConfigDict()
    c.seed = 0

    c.model = m = ConfigDict()
    m.image_size = _any(28)  # or (height, width); patch_size too
    m.image_channels = 1
    m.patch_size = _any(4)
    m.width = 128
    m.layers_per_block = (4, 4, 4, 4)
    m.num_classes = 10  # 0 for no classes
    m.num_features = 0  # length of an image's feature vector; 0 for no features
    m.noise_conditioned = False  # iTARFlow; needs train.noise='levels'
    m.head_dim = 64
    m.orders = _any('alternate')  # or one permutation of the patches per block
    m.scale = 'exp'  # or 'softplus'
    m.scale_limit = _any(None)  # bounds log-scales and shifts
    m.first_token = 'identity'  # or 'start'
    m.volume_preserving = False
    m.dtype = 'float32'  # or 'bfloat16'
    m.residual_dtype = 'float32'  # for the residual stream, as in the official code; or 'bfloat16'
    m.precision = 'highest'  # for float32 products on TPU; or 'high', 'default'
    m.remat = 'none'  # or 'layer', 'dots', 'attention'
    m.unroll = 1  # layers per loop iteration
    m.attention = 'auto'  # the best kernel for the chip; or one of flow.attention.KERNELS

    c.mesh = mesh = ConfigDict()  # sizes of the device mesh; one may be -1 for all other devices
    mesh.data = -1
    mesh.fsdp = 1
    mesh.tensor = 1

    c.data = d = ConfigDict()
    d.source = 'embedded'  # or 'prepared' (a folder of data.prepare), 'idx' (IDX files), 'tfds'
    d.path = ''  # the folder; for tfds its data_dir
    d.name = ''  # name of the TFDS builder
    d.train_split = 'train'
    d.test_split = 'test'
    d.expects = ()  # kinds of datasets that the config's result is for; see data.kinds
    d.flip = False  # random horizontal flips
    d.workers = 0  # number of decoding processes; 0 uses threads

    c.train = t = ConfigDict()
    t.batch_size = 256
    t.epochs = 100.0
    t.noise = 'gaussian'  # or 'uniform', 'levels'
    t.noise_std = 0.1  # in units of the [-1, 1] range; the highest level
    t.lowest_noise_std = 0.01  # the lowest level
    t.levels = 'uniform'  # distribution of levels; or 'uniform_square', 'log_normal'
    t.weight = 'level'  # weight of an image's loss at its level; see training.corruption.WEIGHTS
    t.label_dropout = 0.1  # drops features too
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
    s.label = -1  # one class for all samples; -1 cycles through the classes
    s.denoise_strength = 1.0  # 0 turns denoising off
    s.denoise_steps = 0  # for noise-conditioned flows; 0 is one per 0.01 of train.noise_std
    s.denoise_solver = 'ode'  # or 'sde'
    s.denoise_clip = False  # clips estimates to [-1, 1]
    s.denoise_precision = 'highest'  # as model.precision; iterative denoising uses float32
    s.method = 'sequential'  # or 'auto': uses a schedule stored in the workdir
    s.tolerance = 1e-4  # for 'auto': largest error of an image, in [-1, 1]
    s.format = 'npz'  # one of SAMPLE_FORMATS

    c.guidance = g = ConfigDict()  # the fields of tarflow_jax.Guidance
    g.weight = 0.0
    g.target = 'both'
    g.temperature = 1.0
    g.annealed = False
    g.rule = 'linear'
    g.blocks = _any(None)  # number of blocks to guide, from the one inverted first

    c.evaluate = e = ConfigDict()
    e.metrics = ('bits_per_dim',)  # any of evaluation.scores.SCORES
    e.batch_size = 200
    e.draws = 1  # noise samples per image
    e.levels = ()  # levels of the score 'levels'; () for five from the lowest to the highest
    e.round_trip_images = 32
    e.outliers = o = ConfigDict()
    o.images = 1000  # images per dataset
    o.source = ''  # one more dataset, with the fields of data
    o.path = ''
    o.name = ''
    o.split = 'test'
    e.frechet = f = ConfigDict()
    f.network = 'auto'  # 'inception' (FID) if weights is set, else 'efficientnet_lite0'
    f.weights = ''  # pt_inception-2015-12-05-6726825d.pth
    f.references = ('train_flipped', 'train')  # or files of statistics: .npz, .pth
    f.samples = ''  # a finished set of samples; '' samples as in config.sample
    f.statistics = ''  # folder for cached statistics; '' for WORKDIR/statistics
    f.neighbours = 10_000  # images of each kind for precision and recall
    f.batch_size = 100

    c.report = r = ConfigDict()  # the page that --mode=report writes
    r.after_training = True
    r.rows = 10  # of samples, one class each
    r.columns = 6
    r.guidance_weights = (0.5, 1.0, 2.0, 4.0)  # in addition to guidance.weight
    r.training_images = 2000  # among which the neighbours of samples are looked for
    r.test_images = 500  # whose likelihoods are compared
    return c


def variant(arg: str, variants: tuple[str, ...], *, default: str) -> tuple[str, bool]:
    """Parses ARG of --config=FILE:ARG into (variant, whether to `smoke` it)."""
    words = [word for word in arg.split(',') if word]
    chosen = [word for word in words if word != 'smoke']
    for word in chosen:
        if word not in variants:
            raise ValueError(
                f'config variant {word!r} must be one of {", ".join(variants)}, smoke.'
            )
    if len(chosen) > 1:
        raise ValueError(f'config variants {chosen} exclude each other; choose one.')
    return (chosen or [default])[0], 'smoke' in words


def smoke(config: ConfigDict) -> ConfigDict:
    """Shrinks a config to seconds on a CPU: its recipe with embedded images and a tiny flow."""
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
    """The objects that training, sampling and evaluation use, built from a config."""

    model: TarFlow
    recipe: Recipe
    guidance: Guidance
    denoising: Denoising | None
    conditions: Conditions  # conditions of samples

    def on(self, layout) -> 'Plan':
        """Returns the plan with its flow on a mesh; raises ValueError if it does not fit."""
        named('model', layout.check_attention, self.model)
        layout.check_parameters(self.model)
        return dataclasses.replace(self, model=self.model.clone(layout=layout))

    def with_features_of(self, source) -> 'Plan':
        """Returns the plan with samples conditioned on the features of the source, in turn."""
        if not self.model.num_features:
            return self
        count = min(len(source), MOST_FEATURES)
        features = np.stack([source[i]['features'] for i in range(count)])
        conditions = dataclasses.replace(self.conditions, features=features)
        return dataclasses.replace(self, conditions=conditions)

    def with_class_names(self, names) -> 'Plan':
        """Returns the plan with these class names for its samples; None for no names."""
        named = names if self.model.num_classes else None
        conditions = dataclasses.replace(self.conditions, class_names=named)
        return dataclasses.replace(self, conditions=conditions)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The number of training steps, and the optimizer."""

    steps_per_epoch: int
    total_steps: int
    learning_rate: Callable
    optimizer: optax.GradientTransformation


def plan(config: ConfigDict) -> Plan:
    """Checks every field except those of the data, and builds the plan.

    Raises:
      ValueError: if a field is wrong; the message has the field, its value and the remedy.
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
                f'{field} {value!r:.100} must be one of {", ".join(filter(None, choices))}.'
            )
    for kind in config.data.expects:
        if kinds.plain(kind) not in kinds.NAMES:
            raise ValueError(
                f'data.expects {kind!r:.100} must be one of {", ".join(kinds.NAMES)}.'
            )
    fields = config.model.to_dict()
    for field in ('dtype', 'residual_dtype'):
        fields[field] = DTYPES[fields[field]]
    del fields['attention']  # it belongs to the layout
    fields['layers_per_block'] = tuple(fields['layers_per_block'])
    model = named('model', TarFlow, **fields)
    t, s = config.train, config.sample
    recipe = named('train', Recipe, **{
        field.name: t[field.name] for field in dataclasses.fields(Recipe)
    })
    if model.noise_conditioned != (recipe.noise == 'levels'):
        raise ValueError(
            f"train.noise {recipe.noise!r} does not fit model.noise_conditioned "
            f"{model.noise_conditioned}; noise-conditioned flows, and only these, need 'levels'."
        )
    guidance = named('guidance', Guidance, **config.guidance.to_dict())
    named('guidance', guidance.check, model, Condition(labels=(), features=()))
    if s.label >= max(model.num_classes, 1):
        raise ValueError(
            f'sample.label {s.label} is outside 0..{model.num_classes - 1}, the classes of the '
            'model; -1 cycles through all classes.'
        )
    if recipe.noise == 'levels':
        _check_levels(config.evaluate.levels, recipe)
    conditions = Conditions(
        model.num_classes, s.label, recipe.noise_std if model.noise_conditioned else None
    )
    return Plan(model, recipe, guidance, _denoising(recipe, s), conditions)


def named(section: str, function: Callable, *args, **kwargs):
    """Calls a library function whose errors start with the name of an argument.

    Raises:
      ValueError: the function's error, with the name of the config field instead.
    """
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise ValueError(f'{section}.{error}') from error


def _check_levels(levels, recipe: Recipe) -> None:
    """Raises ValueError unless the flow was trained on these noise levels."""
    low, high = recipe.lowest_noise_std, recipe.noise_std
    if recipe.levels == 'log_normal':
        low, high = 0.0, math.inf
    for level in levels:
        if not low <= level <= high:
            raise ValueError(
                f'evaluate.levels {tuple(levels)} must be numbers from train.lowest_noise_std '
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
    """Opens the 'train' or 'test' images and checks them against the model.

    Raises:
      ValueError or FileNotFoundError: if they are missing, damaged or of another shape.
    """
    d = config.data
    if d.source == 'embedded' and (d.path or d.name):
        field = 'path' if d.path else 'name'
        raise ValueError(
            f"data.{field} {d[field]!r:.200} has no effect with data.source 'embedded'; set "
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
    """Returns the number of steps and the optimizer for a training set.

    Raises:
      ValueError: if the batch size or the epochs do not fit the training set.
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
            f'train.epochs {t.epochs:g} is more than {MOST_STEPS} steps of {t.batch_size} images; '
            'choose fewer.'
        )
    total_steps = round(t.epochs * steps_per_epoch)
    warmup_steps = round(t.warmup_epochs * steps_per_epoch)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f'train.warmup_epochs {t.warmup_epochs} is {warmup_steps} steps, all of the '
            f'{total_steps} steps; lower train.warmup_epochs or raise train.epochs.'
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
    """Returns the config's optimizer for a learning rate, a function of the update count."""
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
