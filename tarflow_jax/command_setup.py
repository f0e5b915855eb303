"""What the modes of the command line begin with: their flags, the flow, what they announce."""

import functools
import hashlib
import logging
from pathlib import Path

import jax

from tarflow_jax import class_order, paths, run_checks
from tarflow_jax import config as configs
from tarflow_jax import convert as official
from tarflow_jax.data import kinds, sizes
from tarflow_jax.evaluation.scores import check_names
from tarflow_jax.training import memory, sharding
from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.state import all_finite

log = logging.getLogger('tarflow_jax.commands')

FLAGS = (
    'workdir', 'input', 'output', 'images', 'known', 'gif', 'topology', 'batch_per_chip', 'json',
    'out', 'profile_steps',
)


def only(given, *names: str) -> None:
    """ValueError if a flag is given that has no meaning with this mode."""
    for name in FLAGS:
        if name not in names and getattr(given, name):
            value = getattr(given, name)
            value = ','.join(value) if isinstance(value, list) else value
            raise ValueError(
                f'--{name}={value} has no meaning with --mode={given.mode}; leave it out.'
            )


def announce(mode: str, model, mesh, **rows: str) -> None:
    """Says what is about to be done, before anything is compiled."""
    layers = sorted(set(model.layers_per_block))
    depth = layers[0] if len(layers) == 1 else ','.join(map(str, model.layers_per_block))
    patch = sizes.text(model.patch_shape)
    count = memory.parameter_count(model)
    lines = {
        'flow': f'{patch}-{model.width}-{len(model.layers_per_block)}-{depth} at '
        f'{"x".join(map(str, model.image_shape))}, {count:,} parameters, '
        f'{jax.numpy.dtype(model.dtype).name}',
    }
    if mesh is not None:
        axes = ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())
        lines['devices'] = (
            f'{mesh.devices.size} x {mesh.devices.flat[0].device_kind} of '
            f'{jax.process_count()} process(es) as {axes}'
        )
    width = max(map(len, lines | rows))
    text = (f'  {name:{width}}  {value}' for name, value in (lines | rows).items())
    log.info('%s\n%s', mode, '\n'.join(text))


def of(config, given, *flags: str):
    """The folder of the run, and what `plan_of` gives; ValueError for other flags than these."""
    only(given, 'workdir', *flags)
    return workdir_of(given.workdir), *plan_of(config)


def workdir_of(workdir) -> Path:
    if not workdir:
        raise ValueError('--workdir is missing; give the folder of the run.')
    return run_checks.workdir(workdir)


def plan_of(config):
    """What the config means, its flow laid out over the mesh of all devices; and the mesh."""
    plan = configs.plan(config)
    check_names(config.evaluate.metrics, plan.model)
    mesh = configs.named('mesh', sharding.make_mesh, **config.mesh)
    plan = plan.on(sharding.Layout(mesh, config.model.attention))
    memory.check(memory.of_parameters(plan.model, mesh), plan.model, mesh, 'the flow alone')
    return plan, mesh


def variables_of(plan, workdir, input_file, mesh):
    """The variables to work with, on the devices; where they come from, as JSON values; classes.

    Raises:
      ValueError: if one of them is not finite.
    """
    if input_file:
        variables = official.load_official(input_file, plan.model)
        variables = jax.device_put(variables, sharding.shardings(variables, mesh))
        known = classes_in(input_file)
        with paths.local_copy(input_file).open('rb') as file:
            return variables, {
                'name': input_file, 'sha256': hashlib.file_digest(file, 'sha256').hexdigest()
            }, known
    with Checkpoints(workdir, plan.model) as checkpoints:
        variables = checkpoints.restore_variables(functools.partial(sharding.placed, mesh=mesh))
        step, known = checkpoints.latest(), run_checks.classes_of(checkpoints)
    if not jax.jit(all_finite)(variables):
        raise ValueError(
            f'{checkpoints.folder / str(step)} holds parameters that are not finite; delete this '
            'folder to take the checkpoint before it, or train again with a lower '
            'train.peak_learning_rate.'
        )
    return variables, at_step(step, workdir), known


def classes_in(input_file: str) -> class_order.Classes:
    return class_order.Classes(official.class_names(input_file) or class_order.SORTED)


def caution(config, source) -> dict[str, str]:
    found = kinds.mismatch(config.data.expects, source.about.get('kind'))
    return {'caution': found} if found else {}


def at_step(step: int, workdir) -> dict:
    return {'name': f'step {step} of {workdir}', 'step': step}
