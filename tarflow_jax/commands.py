"""What the modes of the command line do.

Each function here checks everything a user can get wrong and returns the work as a closure:
whatever is raised before that is the user's to mend, and nothing has been compiled by then.
"""

import functools
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax

from tarflow_jax import config as configs
from tarflow_jax import convert as official
from tarflow_jax.evaluation.bits_per_dim import bits_per_dim
from tarflow_jax.evaluation.classification import classification
from tarflow_jax.training import loop, pictures, sharding
from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.state import from_variables

SCORES = {'bits_per_dim': bits_per_dim, 'classification': classification}

log = logging.getLogger(__name__)


def train(config, workdir, input_file, output_file) -> Callable[[], None]:
    """Trains, then samples and evaluates."""
    _refuse('train', input=input_file, output=output_file)
    workdir = _workdir(workdir)
    plan = configs.plan(config)
    source = configs.source(config, 'train', plan.model)
    test_source = configs.source(config, 'test', plan.model)
    schedule = configs.schedule(config, source)
    mesh = sharding.make_mesh()
    _check_batches(config, mesh)
    checkpoints = Checkpoints(workdir, plan.model, config.to_dict())
    _check_average(checkpoints, config)

    def job():
        with checkpoints:
            state = loop.train(config, plan, schedule, source, checkpoints, workdir, mesh)
        step, variables = int(state.step), state.variables()
        _write_scores(config, plan, variables, test_source, mesh, workdir, f'step {step}')
        log.info('pictures are in %s, metrics in %s', workdir / 'samples', workdir)

    return job


def sample(config, workdir, input_file, output_file) -> Callable[[], None]:
    """Draws config.sample.count images: PNG sheets and one .npz of uint8 images and labels."""
    _refuse('sample', output=output_file)
    workdir = _workdir(workdir)
    plan = configs.plan(config)
    mesh = sharding.make_mesh()
    variables, origin = _variables(config, plan, workdir, input_file, mesh)

    def job():
        s, model = config.sample, plan.model
        labels = pictures.class_labels(model, s.count, s.label)
        drawn, redraws, start = [], 0, time.perf_counter()
        for first in range(0, s.count, s.batch_size):
            count = min(s.batch_size, s.count - first)
            images = pictures.draw(
                model,
                variables,
                jax.random.fold_in(jax.random.key(config.seed), first),
                None if labels is None else labels[first : first + count],
                count,
                mesh=mesh,
                guidance=plan.guidance,
                noise_std=plan.gaussian_noise_std,
                denoise_strength=s.denoise_strength,
            )
            redraws += int(images['redraws'].sum())
            pixels = pictures.to_pixels(images.get('denoised', images['raw']))
            drawn.append(pixels)
            path = workdir / 'samples' / f'sample_{first:06d}.png'
            pictures.save_png(path, pictures.grid(pixels, 10), scale=2)
            log.info('%d of %d images, %.1f s', first + count, s.count, time.perf_counter() - start)
        arrays = {'images': np.concatenate(drawn)}
        if labels is not None:
            arrays['labels'] = labels
        np.savez_compressed(workdir / 'samples' / 'samples.npz', **arrays)
        log.info('%d samples of %s (%d drawn again) are in %s', s.count, origin, redraws,
                 workdir / 'samples')

    return job


def evaluate(config, workdir, input_file, output_file) -> Callable[[], None]:
    """Scores the flow on the test set with config.evaluate.metrics; writes evaluation.json."""
    _refuse('evaluate', output=output_file)
    workdir = _workdir(workdir)
    plan = configs.plan(config)
    source = configs.source(config, 'test', plan.model)
    mesh = sharding.make_mesh()
    variables, origin = _variables(config, plan, workdir, input_file, mesh)
    return functools.partial(
        _write_scores, config, plan, variables, source, mesh, workdir, origin
    )


def convert(config, workdir, input_file, output_file) -> Callable[[], None]:
    """Official checkpoint into a workdir as step 0, or out of a workdir (averaged parameters)."""
    plan = configs.plan(config)
    mesh = sharding.make_mesh()
    if not (input_file or output_file):
        raise ValueError(
            '--mode=convert needs --input=FILE (an official checkpoint, to --workdir) or '
            '--output=FILE.safetensors (from --workdir, or from --input).'
        )
    if output_file:
        if not output_file.endswith('.safetensors'):
            raise ValueError(f'--output {output_file} must end with .safetensors.')
        if not Path(output_file).absolute().parent.is_dir():
            raise ValueError(f'--output {output_file}: its folder does not exist; create it first.')
        origin_dir = None if input_file else _workdir(workdir)
        variables, origin = _variables(config, plan, origin_dir, input_file, mesh)

        def write():
            official.save_official(variables, plan.model, output_file)
            log.info('%s is now %s', origin, output_file)

        return write

    workdir = _workdir(workdir)
    variables = official.load_official(input_file, plan.model)
    checkpoints = Checkpoints(workdir, plan.model, config.to_dict())
    if checkpoints.latest() is not None:
        raise ValueError(
            f'{workdir} already holds a checkpoint at step {checkpoints.latest()}; choose an empty '
            '--workdir.'
        )

    def store():
        # The optimizer starts afresh: the structure of its state does not depend on its settings.
        optimizer = configs.optimizer(config, optax.constant_schedule(0.0))
        state = from_variables(variables, optimizer, ema=plan.recipe.ema_decay > 0)
        with checkpoints:
            checkpoints.save(state)
            checkpoints.wait()
        log.info('%s is now step 0 of %s', input_file, workdir)

    return store


MODES = {'train': train, 'sample': sample, 'evaluate': evaluate, 'convert': convert}


def _refuse(mode: str, **given) -> None:
    for flag, value in given.items():
        if value:
            raise ValueError(f'--{flag}={value} has no meaning with --mode={mode}; leave it out.')


def _workdir(workdir) -> Path:
    if not workdir:
        raise ValueError('--workdir is missing; give the folder of the run.')
    workdir = Path(workdir)
    there = next(p for p in (workdir.absolute(), *workdir.absolute().parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f'--workdir={workdir}: {there} is not a folder; choose another.')
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f'--workdir={workdir}: {there} cannot be written to; choose another.')
    return workdir


def _check_batches(config, mesh) -> None:
    part = config.train.batch_size // config.train.accumulation
    if part % mesh.size:
        raise ValueError(
            f'train.batch_size {config.train.batch_size} in {config.train.accumulation} part(s) '
            f'cannot be shared evenly by {mesh.size} devices; choose a multiple of '
            f'{mesh.size * config.train.accumulation}.'
        )


def _check_average(checkpoints: Checkpoints, config) -> None:
    if checkpoints.latest() is None:
        return
    there, here = checkpoints.about()['config']['train']['ema_decay'], config.train.ema_decay
    if (there > 0) != (here > 0):
        raise ValueError(
            f'{checkpoints.folder} holds a checkpoint with train.ema_decay {there}, this config has '
            f'{here}; an average can be neither begun nor dropped on the way.'
        )


def _variables(config, plan, workdir, input_file, mesh):
    """The variables to work with, on the devices, and a name for where they come from."""
    everywhere = sharding.replicated(mesh)
    if input_file:
        variables = official.load_official(input_file, plan.model)
        return jax.device_put(variables, everywhere), input_file
    with Checkpoints(workdir, plan.model) as checkpoints:
        variables = checkpoints.restore_variables(everywhere)
        return variables, f'step {checkpoints.latest()} of {workdir}'


def _write_scores(config, plan, variables, source, mesh, workdir: Path, origin: str) -> None:
    """Runs the metrics, prints them and writes them with what is needed to repeat them."""
    e = config.evaluate
    scores = {}
    for name in e.metrics:
        start = time.perf_counter()
        scores[name] = SCORES[name](
            plan.model,
            variables,
            source,
            recipe=plan.recipe,
            mesh=mesh,
            batch_size=-(-e.batch_size // mesh.size) * mesh.size,
            key=jax.random.key(config.seed),
            draws=e.draws,
        )
        values = ', '.join(f'{k} {v:.5g}' for k, v in scores[name].items())
        log.info('%s: %s (%.1f s)', name, values, time.perf_counter() - start)
    versions = {p: importlib.metadata.version(p) for p in ('jax', 'jaxlib', 'flax', 'numpy')}
    report = {
        'checkpoint': origin,
        'scores': scores,
        'config': config.to_dict(),
        'versions': versions,
    }
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / 'evaluation.json.tmp'
    temporary.write_text(json.dumps(report, indent=2, default=float) + '\n')
    temporary.replace(workdir / 'evaluation.json')
    log.info('scores are in %s', workdir / 'evaluation.json')


