"""Simulation-based inference on tasks of sbibm: `python benchmarks/sbi.py --files=DIR`.

Fits p(theta | x) to simulations, as docs/simulation_based_inference.md does, and compares samples
of the flow with the suite's reference posteriors of ten observations. `--files` is the folder
`sbibm/tasks` of the sbibm package (`pip install --no-deps sbibm`); only its CSV files are read.
Needs scikit-learn and pandas. Samples outside of the prior are rejected; `--bounds=probit` maps the
prior to a standard normal instead, so that there are none.

Prints one line of JSON per fit: the classifier two-sample test (C2ST) of each observation, computed
as sbibm does (two hidden layers of 10 dim units, 5 folds, z-scored) but with `--samples` samples;
the coverage of regions of highest density at levels 0.1 to 0.9; the largest distance of the ranks'
distribution from uniform, in units of its standard deviation under calibration; the minutes of
training; the parameters. Then a table with means and standard errors over the seeds, beside
published values of neural posterior estimation: Lueckmann et al., "Benchmarking Simulation-Based
Inference", AISTATS 2021, from the files of github.com/sbi-benchmark/results.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import tarflow_jax as tfj

OBSERVATIONS = range(1, 11)
LEVELS = np.arange(0.1, 0.95, 0.1)
# Mean C2ST of NPE over the ten observations, by simulations; main_paper.csv, and for the mixture
# gaussian_mixture_rerun.csv, as sbibm 1.1.0 mended that task.
PUBLISHED = {
    'two_moons': {10_000: 0.606, 100_000: 0.542},
    'gaussian_mixture': {10_000: 0.615, 100_000: 0.548},
    'slcp': {10_000: 0.901, 100_000: 0.831},
}


def two_moons(key, theta):
    """theta [N, 2] to x [N, 2]."""
    angle_key, radius_key = jax.random.split(key)
    angle = jax.random.uniform(angle_key, theta.shape[:1], minval=-np.pi / 2, maxval=np.pi / 2)
    radius = 0.1 + 0.01 * jax.random.normal(radius_key, theta.shape[:1])
    crescent = jnp.stack([radius * jnp.cos(angle) + 0.25, radius * jnp.sin(angle)], axis=1)
    total, difference = theta[:, 0] + theta[:, 1], theta[:, 1] - theta[:, 0]
    return crescent + jnp.stack([-jnp.abs(total), difference], axis=1) / np.sqrt(2)


def gaussian_mixture(key, theta):
    """theta [N, 2] to x [N, 2]: noise of standard deviation 1 or 0.1, each half of the time."""
    choice_key, noise_key = jax.random.split(key)
    scale = jnp.where(jax.random.bernoulli(choice_key, shape=(len(theta), 1)), 1.0, 0.1)
    return theta + scale * jax.random.normal(noise_key, theta.shape)


def slcp(key, theta):
    """theta [N, 5] to x [N, 8]: four draws of a Gaussian in the plane."""
    noise = jax.random.normal(key, (len(theta), 4, 2))
    first, second = jnp.square(theta[:, 2:3]), jnp.square(theta[:, 3:4])
    rho = jnp.tanh(theta[:, 4:5])
    x = theta[:, 0:1] + first * noise[..., 0]
    y = theta[:, 1:2] + second * (
        rho * noise[..., 0] + jnp.sqrt(1 - jnp.square(rho)) * noise[..., 1]
    )
    return jnp.stack([x, y], axis=2).reshape(-1, 8)


@dataclasses.dataclass(frozen=True)
class Task:
    """A simulator, and its prior, uniform in [-bound, bound]^dim."""

    simulate: Callable
    bound: float
    dim: int
    observed: int  # numbers in x


TASKS = {
    'two_moons': Task(two_moons, 1.0, 2, 2),
    'gaussian_mixture': Task(gaussian_mixture, 10.0, 2, 2),
    'slcp': Task(slcp, 3.0, 5, 8),
}


class Posterior:
    """A flow fitted to simulations of a task."""

    def __init__(self, task: Task, key, flags):
        prior_key, noise_key, fit_key = jax.random.split(key, 3)
        self.task, self.rejects, self.tries = task, flags.bounds == 'reject', flags.tries
        # Of variance 1 under the prior, either way.
        self.to = (
            tfj.Standardize(jnp.zeros(1), jnp.full(1, task.bound / np.sqrt(3)))
            if self.rejects else tfj.Probit(-task.bound, task.bound)
        )
        theta = jax.random.uniform(
            prior_key, (flags.count, task.dim), minval=-task.bound, maxval=task.bound
        )
        x = task.simulate(noise_key, theta)
        self.standard = tfj.Standardize.fit(x)
        features = self.standard.forward(x)[0]
        self.flow = tfj.SequenceFlow(
            length=task.dim, token_dim=1, width=flags.width, head_dim=min(32, flags.width),
            layers_per_block=(flags.layers,) * flags.blocks, num_features=features.shape[1],
            first_token='start', scale_limit=flags.scale_limit or None, unroll=flags.layers,
        )
        y, held = self.to.forward(theta)[0][..., None], flags.count // 10
        begin = time.perf_counter()
        self.fitted = tfj.fit(
            self.flow, y[held:], tfj.Condition(features=features[held:]), key=fit_key,
            steps=flags.steps, batch_size=flags.batch_size, learning_rate=flags.learning_rate,
            weight_decay=flags.weight_decay, ema_decay=flags.ema_decay,
            held_out=(y[:held], tfj.Condition(features=features[:held])),
            validate_every=flags.validate_every, patience=flags.patience,
        )
        self.minutes = (time.perf_counter() - begin) / 60

    def sample(self, key, x, count):
        """Samples of each of B observations: theta [count, B, dim] and log densities [count, B].

        Without the share of samples that are rejected, a constant for each observation. `inside`
        becomes the smallest share inside of the prior: below 1 / tries, some outside are returned.
        """
        count, wanted = count * (self.tries if self.rejects else 1), count
        features = jnp.tile(self.standard.forward(x)[0], (count, 1))
        noise = jax.random.normal(key, (len(features), self.task.dim, 1))
        y, log_prob = tfj.sample(
            self.flow, self.fitted.variables, noise, tfj.Condition(features=features),
            return_log_prob=True,
        )
        theta, logdet = self.to.inverse(y[..., 0])
        theta = theta.reshape(count, len(x), -1)
        # The samples inside of the prior come first, in their order.
        outside = (jnp.abs(theta) > self.task.bound).any(-1)
        self.inside = float((~outside).mean(0).min())
        order = jnp.argsort(outside, axis=0)[:wanted]
        log_prob = (log_prob - logdet).reshape(count, len(x))
        theta = jnp.take_along_axis(theta, order[..., None], axis=0)
        return theta, jnp.take_along_axis(log_prob, order, axis=0)

    def log_prob(self, theta, x):
        y, logdet = self.to.forward(theta)
        condition = tfj.Condition(features=self.standard.forward(x)[0])
        return tfj.log_prob(self.flow, self.fitted.variables, y[..., None], condition) + logdet

    def calibration(self, key, count, samples=100):
        """Shares of samples with a higher density than the truth [count], and ranks [count, dim]."""
        prior_key, noise_key, key = jax.random.split(key, 3)
        shape, bound = (count, self.task.dim), self.task.bound
        theta = jax.random.uniform(prior_key, shape, minval=-bound, maxval=bound)
        x = self.task.simulate(noise_key, theta)
        drawn, log_prob = self.sample(key, x, samples)
        return (log_prob > self.log_prob(theta, x)).mean(0), (drawn < theta).mean(0)


def c2st(reference, samples, seed=1):
    """The accuracy of a classifier between two sets of samples, as in sbibm; 0.5 is the best."""
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    mean, std = reference.mean(0), reference.std(0, ddof=1)
    data = np.concatenate([(part - mean) / std for part in (reference, samples)])
    target = np.repeat([0.0, 1.0], [len(reference), len(samples)])
    hidden = (10 * data.shape[1],) * 2
    classifier = MLPClassifier(hidden, max_iter=10_000, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    return cross_val_score(classifier, data, target, cv=folds, scoring='accuracy').mean()


def distance_from_uniform(ranks):
    """Largest |F(r) - r| in units of 1 / sqrt(N), the statistic of Kolmogorov and Smirnov.

    Of calibrated ranks it is above 1.36 in one of twenty cases.
    """
    ordered, count = np.sort(ranks), len(ranks)
    above = np.abs(np.arange(1, count + 1) / count - ordered).max()
    return np.sqrt(count) * max(above, np.abs(np.arange(count) / count - ordered).max())


def plot(file, references, samples, shares):
    """Draws samples beside the reference posteriors, by two parameters, and the coverage."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(references) + 1, figsize=(3.6 * len(references) + 3.6, 3.6))
    for axis, reference, own in zip(axes, references, samples):
        for points, label in ((reference, 'reference'), (own, 'flow')):
            axis.scatter(*points[:1000, :2].T, s=2, alpha=0.5, label=label)
        axis.legend(fontsize=8)
    axes[-1].plot([0, 1], [0, 1], color='grey', linestyle=':')
    axes[-1].plot(np.sort(shares), np.linspace(0, 1, len(shares)))
    axes[-1].set(title='coverage', xlabel='level of the region of highest density')
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def run(name: str, flags, seed: int) -> dict:
    import pandas

    task, key = TASKS[name], jax.random.key(seed)
    posterior = Posterior(task, key, flags)
    folders = [flags.files / name / 'files' / f'num_observation_{n}' for n in OBSERVATIONS]
    x = jnp.concatenate([
        pandas.read_csv(f / 'observation.csv').to_numpy(np.float32) for f in folders
    ])
    drawn, _ = posterior.sample(jax.random.fold_in(key, 1), x, flags.samples)
    drawn, inside = np.asarray(drawn).swapaxes(0, 1), posterior.inside
    references = [
        pandas.read_csv(folder / 'reference_posterior_samples.csv.bz2').to_numpy()[: flags.samples]
        for folder in folders[: flags.observations]
    ]
    scores = list(map(c2st, references, drawn))
    shares, ranks = posterior.calibration(jax.random.fold_in(key, 2), flags.calibrations)
    if flags.plot:
        plot(flags.plot, references[:9:4], drawn[:9:4], shares)
    best = min(loss for _, loss in posterior.fitted.held_out_losses)
    return {
        'task': name, 'simulations': flags.count, 'seed': seed,
        'c2st': round(float(np.mean(scores)), 4), 'of_each': np.round(scores, 3).tolist(),
        'inside': round(inside, 3), 'held_out_nats': round(best, 4),
        'steps': len(posterior.fitted.losses),
        'coverage': [round(float((shares < level).mean()), 3) for level in LEVELS],
        'density_ranks': round(float(distance_from_uniform(shares)), 2),
        'parameter_ranks': [round(float(distance_from_uniform(r)), 2) for r in ranks.T],
        'minutes': round(posterior.minutes, 2),
        'parameters': sum(p.size for p in jax.tree.leaves(posterior.fitted.variables)),
    }


def table(rows: list[dict]) -> str:
    """Means and standard errors over the seeds, as Markdown."""
    lines = [
        '| task | simulations | seeds | C2ST | NPE, published | density ranks | minutes '
        '| parameters |', '|---|---|---|---|---|---|---|---|',
    ]
    for name, count in dict.fromkeys((row['task'], row['simulations']) for row in rows):
        own = [row for row in rows if (row['task'], row['simulations']) == (name, count)]

        def mean(field, own=own):
            values = [row[field] for row in own]
            error = np.std(values, ddof=1) / np.sqrt(len(own)) if len(own) > 1 else np.nan
            return np.mean(values), error

        (score, error), (ranks, _), (minutes, _) = map(mean, ('c2st', 'density_ranks', 'minutes'))
        lines.append(
            f'| {name} | {count:,} | {len(own)} | {score:.3f} ± {error:.3f} | '
            f'{PUBLISHED[name].get(count, np.nan)} | {ranks:.2f} | {minutes:.1f} | '
            f'{own[0]["parameters"]:,} |'
        )
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--files', type=Path, required=True)
    parser.add_argument('--task', default='two_moons,gaussian_mixture')
    parser.add_argument('--simulations', default='10000,100000')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--first_seed', type=int, default=0)
    parser.add_argument('--samples', type=int, default=2000)
    parser.add_argument('--observations', type=int, default=10)
    parser.add_argument('--calibrations', type=int, default=300)
    parser.add_argument('--plot', default='', help='a file for a picture of the last fit')
    parser.add_argument('--bounds', choices=('reject', 'probit'), default='reject')
    parser.add_argument('--tries', type=int, default=2, help='samples for each that is not rejected')
    parser.add_argument('--width', type=int, default=32)
    parser.add_argument('--blocks', type=int, default=8)
    parser.add_argument('--layers', type=int, default=1)
    parser.add_argument('--scale_limit', type=float, default=0.0)
    parser.add_argument('--steps', default='1500,2500', help='one for each of --simulations')
    parser.add_argument('--batch_size', type=int, default=500)
    parser.add_argument('--learning_rate', type=float, default=4e-3)
    parser.add_argument('--weight_decay', type=float, default=1e-4)
    parser.add_argument('--ema_decay', type=float, default=0.99)
    parser.add_argument('--validate_every', type=int, default=200)
    parser.add_argument('--patience', type=int, default=None)
    flags = parser.parse_args()
    counts, all_steps = (
        [int(n) for n in text.split(',')] for text in (flags.simulations, flags.steps)
    )
    if len(counts) != len(all_steps):
        parser.error(
            f'--steps={flags.steps} must have one number for each of --simulations={flags.simulations}'
        )
    rows = []
    for name in flags.task.split(','):
        for count, steps in zip(counts, all_steps):
            flags.count, flags.steps = count, steps
            for seed in range(flags.first_seed, flags.first_seed + flags.seeds):
                rows.append(run(name, flags, seed))
                print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


if __name__ == '__main__':
    main()
