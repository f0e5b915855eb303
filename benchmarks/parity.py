"""Compares a device with recorded numbers of the official code: `python benchmarks/parity.py --device=gpu`.

It runs every case of tests/parity in float32: latents, log-determinants, losses and gradients,
samples with every recorded guidance, denoising in one and in many steps, and 24 training steps. It
prints one line of JSON per case: the largest errors over the largest magnitude, and whether all are
within the tolerances of the CPU tests: 1e-5, and 1e-4 for gradients, samples, denoised images and
training.
"""

import functools
import json
import sys
import time
from pathlib import Path

import comparison
import jax
import numpy as np

import tarflow_jax as tfj
from tarflow_jax.flow import likelihood
from tarflow_jax.training.corruption import WEIGHTS, Recipe
from tarflow_jax.training.optimizer import adamw, learning_rate_schedule
from tarflow_jax.training.state import from_variables
from tarflow_jax.training.step import update

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests'))

from parity_cases import (  # noqa: E402
    CASES,
    ITARFLOW_CASES,
    Case,
    official_condition,
    official_guidance,
    relative_error,
)

TRAJECTORIES = ('trajectory', 'itarflow_trajectory')


def forward(case: Case) -> dict[str, float]:
    model, x, condition = case.model, case.images('x'), case.condition()
    noisy = model.noise_conditioned
    weight = WEIGHTS['level'](case['t'], None, None) if noisy else None

    @jax.jit
    def run(variables, x):
        def loss(x):
            sequences, logdet = model.apply(variables, x, condition, method='trajectory')
            return likelihood.training_loss(sequences[-1], logdet, weight)[0], (sequences[-1], logdet)

        return jax.value_and_grad(loss, has_aux=True)(x)

    (value, (z, logdet)), gradient = run(case.variables, x)
    kind = 'loss_t' if noisy else 'loss'
    found = {
        'z': relative_error(z, case.sequence('z')),
        'loss': abs(float(value) / float(case[kind]) - 1),
        'gradient': relative_error(gradient, case.images(f'{kind}_grad_x')),
    }
    if not model.volume_preserving:
        found['logdet'] = relative_error(logdet / model.num_dims, case['logdet'])
    return found


def samples(case: Case) -> dict[str, float]:
    found, noise, condition = {}, case.sequence('noise'), official_condition(case)
    tags = sorted(name[7:] for name in case.arrays if name.startswith('kwargs_'))
    for tag in tags:
        guidance = official_guidance(case, tag)
        if case.model.num_classes == 0 and guidance.temperature == 1:
            guidance = None  # the official code returns the unguided sample
        images = tfj.sample(case.model, case.variables, noise, condition, guidance=guidance)
        found[f'sample_{tag}'] = relative_error(images, case.images(f'sample_{tag}'))
    images = tfj.sample(case.model, case.variables, noise, condition)
    return found | {'sample': relative_error(images, case.images('sample'))}


def denoised(case: Case) -> dict[str, float]:
    if case.model.noise_conditioned:
        images = tfj.iterative_denoise(
            case.model, case.variables, case.images('sample_g_anneal'), case.labels(),
            levels=case['ode_t'],
        )
        return {'ode': relative_error(images, case.images('ode'))}
    variables = jax.tree.map(np.array, case.variables)
    if 'prior' in variables:  # the official code denoises such flows under the unit prior
        variables['prior']['variance'][:] = 1
    images = tfj.denoise(
        case.model, variables, case.images('x'), case.labels(), noise_std=float(case['denoise_sigma'])
    )
    return {'denoised': relative_error(images, case.images('denoised'))}


def trained(name: str) -> dict[str, float]:
    """Returns the errors of the recorded losses, and of the final parameters of each tensor."""
    case = Case(name, 'initial.pth')
    schedule = learning_rate_schedule(
        peak=float(case['peak_lr']), floor=float(case['min_lr']),
        warmup_steps=int(case['warmup_steps']), total_steps=int(case['total_steps']),
    )
    optimizer = adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=1e-4, clip_norm=0.0)
    recipe = Recipe(noise_std=0.1, label_dropout=0.0, ema_decay=0.0)
    state = from_variables(case.variables, optimizer, ema=False)
    step = jax.jit(functools.partial(update, model=case.model, optimizer=optimizer, recipe=recipe))
    losses = []
    for k, (images, labels) in enumerate(zip(case.images('x'), case.labels('y'))):
        condition, weight = labels, None
        if case.model.noise_conditioned:
            condition = tfj.Condition(labels, noise_std=case['t'][k])
            weight = WEIGHTS['level'](case['t'][k], None, None)
        state, metrics = step(state, images, condition, weight)
        losses.append(float(metrics['loss']))
    return {'training': relative_error(np.array(losses), case['loss'])}


def main():
    parser = comparison.arguments(__doc__, repeats=1)
    parser.add_argument('--cases', default=','.join((*CASES, *ITARFLOW_CASES, *TRAJECTORIES)))
    args = parser.parse_args()
    comparison.use(args.device)
    for name in args.cases.split(','):
        start = time.perf_counter()
        if name in TRAJECTORIES:
            errors = trained(name)
        else:
            case = Case(name)
            errors = forward(case) | samples(case) | denoised(case)
        strict = ('z', 'logdet', 'loss')
        within = all(e < (1e-5 if key in strict else 1e-4) for key, e in errors.items())
        row = {
            'what': 'parity', 'case': name, 'within_tolerance': within,
            'errors': {key: float(f'{e:.2g}') for key, e in errors.items()},
            'seconds': round(time.perf_counter() - start, 1),
        }
        print(json.dumps(row | comparison.versions(False)), flush=True)


if __name__ == '__main__':
    main()
