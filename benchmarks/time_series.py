"""Likelihood and forecasts of time series beside flows of flowjax: `python benchmarks/time_series.py`.

The series are those of docs/time_series.md: a stochastic Lorenz-96 model of 8 sites, 16 values six
hours apart, under a forcing with a daily cycle that is known. Their density is known exactly.

Trains each model for the same number of CPU seconds, compilation aside, with the same learning rate schedule, on the
same series, and keeps the parameters with the best held-out likelihood: the sequence flow, a masked
autoregressive flow (MAF) and a neural spline coupling flow (NSF) of flowjax, which see a series as
128 numbers and the forcing as 16. Prints one line of JSON per model and seed: nats per test series,
and how far they are below the true density. For the sequence flow also forecasts: the continuous
ranked probability score (CRPS) by lead time, beside ensembles of the true model and the
distribution of training series at the same time; the coverage of central intervals. Then tables
with means and standard errors over the seeds; `--plot=FILE` draws a forecast and the scores.
Needs flowjax; the plot needs matplotlib.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.stats import norm

import tarflow_jax as tfj

T, P, D = 16, 8, 8  # times, of which the past, and sites
NOISE, MEAN, SPREAD = 0.5, 2.5, 3.5
LEVELS = (0.5, 0.9)
MEMBERS = 100


# The series.


def step(x, forcing, dt=0.05):
    """One Runge-Kutta step of the Lorenz-96 model, x [..., D], forcing [..., 1]."""
    def slope(x):
        before, after = jnp.roll(x, 1, -1), jnp.roll(x, -1, -1)
        return (after - jnp.roll(x, 2, -1)) * before - x + forcing

    first = slope(x)
    second = slope(x + dt / 2 * first)
    third = slope(x + dt / 2 * second)
    return x + dt / 6 * (first + 2 * second + 2 * third + slope(x + dt * third))


def continued(key, x, forcing):
    """x [B, D] and what follows it under forcing [B, S, 1]: [B, S, D]."""
    noise = NOISE * jax.random.normal(key, (forcing.shape[1], *x.shape))

    def advance(x, given):
        x = step(x, given[0]) + given[1]
        return x, x

    _, rest = jax.lax.scan(advance, x, (forcing.transpose(1, 0, 2), noise))
    return rest.transpose(1, 0, 2)


@functools.partial(jax.jit, static_argnums=1)
def simulate(key, count):
    """Series [N, T, D], and the forcing [N, T, 1] of the steps to each time."""
    phase_key, start_key, noise_key = jax.random.split(key, 3)
    phase = jax.random.uniform(phase_key, (count, 1))
    forcing = 8 + 4 * jnp.sin(2 * jnp.pi * (phase + jnp.arange(T) / 4))[..., None]
    start = MEAN + SPREAD * jax.random.normal(start_key, (count, D))
    rest = continued(noise_key, start, forcing[:, 1:])
    return jnp.concatenate([start[:, None], rest], axis=1), forcing


@jax.jit
def true_log_prob(x, forcing):
    """[N], nats."""
    start = norm.logpdf(x[:, 0], MEAN, SPREAD).sum(1)
    return start + norm.logpdf(x[:, 1:], step(x[:, :-1], forcing[:, 1:]), NOISE).sum((1, 2))


# The models. Each is trained for a number of CPU seconds.


def sequence_flow(key, train, held_out, flags):
    past, future = range(P), range(P, T)
    orders = [(*past, *future), (*reversed(past), *reversed(future))] * (flags.blocks // 2)
    flow = tfj.SequenceFlow(
        length=T, token_dim=D, width=flags.width, head_dim=flags.width // 2,
        layers_per_block=(flags.layers,) * flags.blocks, num_features=1, first_token='start',
        orders=orders, unroll=flags.layers,
    )
    held_out = held_out[0], tfj.Condition(features=held_out[1])
    times = []
    fitted = tfj.fit(
        flow, train[0], tfj.Condition(features=train[1]), key=key, steps=flags.steps,
        batch_size=flags.batch_size, learning_rate=flags.learning_rate, held_out=held_out,
        validate_every=flags.steps // 10, progress=lambda *_: times.append(time.process_time()),
    )
    # Without the first tenth, which compiles.
    return flow, fitted.variables, (times[-1] - times[0]) / 0.9


class Flowjax:
    """A flow of flowjax over flattened series."""

    def __init__(self, kind: str, key):
        import paramax
        from flowjax import bijections, distributions, flows

        base = distributions.Normal(jnp.zeros(T * D))
        if kind == 'maf':
            dist = flows.masked_autoregressive_flow(
                key, base_dist=base, cond_dim=T, flow_layers=6, nn_width=68,
            )
        else:
            dist = flows.coupling_flow(
                key, base_dist=base, cond_dim=T, flow_layers=4, nn_width=26, nn_depth=2,
                transformer=bijections.RationalQuadraticSpline(knots=7, interval=4),
            )
        import equinox

        self.params, static = equinox.partition(
            dist, equinox.is_inexact_array,
            is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
        )
        self.size = sum(p.size for p in jax.tree.leaves(self.params))

        def log_prob(params, x, forcing):
            dist = paramax.unwrap(equinox.combine(params, static))
            return dist.log_prob(x.reshape(len(x), -1), forcing[..., 0])

        self.log_prob = jax.jit(log_prob)

    def train(self, key, train, held_out, seconds: float, batch_size: int, peak: float):
        """Adam with the schedule of `tfj.fit`, over CPU seconds; keeps the best parameters."""
        adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.95))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(params, state, index, rate):
            def loss(params):
                return -self.log_prob(params, train[0][index], train[1][index]).mean()

            updates, state = adam.update(jax.grad(loss)(params), state)
            return optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates)), state

        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        params = jax.tree.map(jnp.copy, self.params)
        state = adam.init(params)
        params, state = update(params, state, np.arange(batch_size), 0.0)  # compiles
        best, lowest = self.params, -float(self.log_prob(self.params, *held_out).mean())
        steps, checked, begin = 0, 0.0, time.process_time()
        while checked < 1:
            done = min((time.process_time() - begin) / seconds, 1.0)
            rate = peak * min(done / 0.05, np.square(np.cos(0.5 * np.pi * (done - 0.05) / 0.95)))
            index = rng.choice(len(train[0]), batch_size, replace=False)
            params, state = update(params, state, index, rate)
            steps += 1
            if steps % 20 == 0:
                jax.block_until_ready(params)
            if done - checked >= 0.05 or done == 1:
                checked, loss = done, -float(self.log_prob(params, *held_out).mean())
                if loss < lowest:
                    best, lowest = jax.tree.map(jnp.copy, params), loss
        self.params = best
        return steps


# Forecasts.


def crps(ensemble, truth):
    """The continuous ranked probability score of M members [M, ...], in units of the data."""
    ordered, count = np.sort(ensemble, axis=0), len(ensemble)
    weights = (2 * np.arange(1, count + 1) - count - 1).reshape(-1, *[1] * truth.ndim)
    spread = (weights * ordered).sum(0) / (count * (count - 1))
    return np.abs(ensemble - truth).mean(0) - spread


def covered(ensemble, truth, level):
    """The share of truths inside the central interval of the level."""
    low, high = np.quantile(ensemble, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    return float(((truth >= low) & (truth <= high)).mean())


def forecasts(flow, variables, to, key, x, forcing, features, train):
    """Ensembles [M, B, F, D] of the flow, the true model and the climatology."""
    keys = jax.random.split(key, 3)
    condition = tfj.Condition(features=features)
    y = tfj.complete(
        flow, variables, keys[0], to.forward(x)[0], np.arange(T) < P, condition,
        num_samples=MEMBERS,
    )
    many = jnp.tile(x[:, P - 1], (MEMBERS, 1)), jnp.tile(forcing[:, P:], (MEMBERS, 1, 1))
    perfect = jax.jit(continued)(keys[1], *many).reshape(MEMBERS, len(x), T - P, D)
    index = jax.random.randint(keys[2], (MEMBERS, len(x)), 0, len(train))
    return {
        'flow': np.asarray(to.inverse(y)[0][:, :, P:]), 'true model': np.asarray(perfect),
        'climatology': np.asarray(train[index][:, :, P:]),
    }


def plot(file, found, truth, x, scores):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6))
    hours = 6 * np.arange(T)
    for axis, name in zip(axes, ('flow', 'true model')):
        axis.plot(hours, x[0, :, 0], color='black', label='series')
        for level, shade in ((0.9, 0.2), (0.5, 0.4)):
            low, high = np.quantile(found[name][:, 0, :, 0], [0.5 - level / 2, 0.5 + level / 2], 0)
            axis.fill_between(
                hours[P:], low, high, alpha=shade, color='tab:blue', linewidth=0,
                label=f'{level:.0%} interval',
            )
        axis.axvline(hours[P - 1], color='grey', linestyle=':')
        axis.set(title=f'one site, forecasts of the {name}', xlabel='hours', ylim=(-9, 14))
        axis.legend(loc='lower left', fontsize=8)
    for name, values in scores.items():
        axes[2].plot(6 * np.arange(1, T - P + 1), values, marker='o', label=name)
    axes[2].set(title='CRPS, lower is better', xlabel='lead time in hours', ylim=(0, None))
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def run(flags, seed: int) -> list[dict]:
    train_key, test_key, fit_key, forecast_key = jax.random.split(jax.random.key(seed), 4)
    x, forcing = simulate(train_key, flags.series)
    test, test_forcing = simulate(test_key, 2000)
    to, scale = tfj.Standardize.fit(x, axis=(0, 1, 2)), tfj.Standardize.fit(forcing, axis=(0, 1, 2))
    y, features = to.forward(x)[0], scale.forward(forcing)[0]
    held, held_out = flags.series // 10, (y[: flags.series // 10], features[: flags.series // 10])
    train = y[held:], features[held:]
    (test_y, logdet), test_features = to.forward(test), scale.forward(test_forcing)[0]
    truth = float(true_log_prob(test, test_forcing).mean())

    flow, variables, seconds = sequence_flow(fit_key, train, held_out, flags)
    rows = []

    def report(name, nats, parameters, steps, **more):
        rows.append({
            'model': name, 'seed': seed, 'nats': round(nats, 3), 'below_truth': round(truth - nats, 3),
            'parameters': parameters, 'steps': steps, 'cpu_seconds': round(seconds), **more,
        })
        print(json.dumps(rows[-1]), flush=True)

    nats = tfj.log_prob(flow, variables, test_y, tfj.Condition(features=test_features)) + logdet
    some = slice(0, flags.forecasts)
    found = forecasts(
        flow, variables, to, forecast_key, test[some], test_forcing[some], test_features[some], x
    )
    future = np.asarray(test[some, P:])
    scores = {
        name: crps(ensemble, future).mean((0, 2)).round(4).tolist()
        for name, ensemble in found.items()
    }
    coverage = {str(level): round(covered(found['flow'], future, level), 4) for level in LEVELS}
    report(
        'sequence flow', float(nats.mean()), sum(p.size for p in jax.tree.leaves(variables)),
        flags.steps, crps=scores, coverage=coverage,
    )
    if flags.plot and seed == 0:
        plot(flags.plot, found, future, np.asarray(test), scores)
    for kind in flags.baselines.split(',') if flags.baselines else ():
        model = Flowjax(kind, jax.random.fold_in(fit_key, 1))
        steps = model.train(
            jax.random.fold_in(fit_key, 2), train, held_out, seconds, flags.batch_size,
            flags.baseline_learning_rate,
        )
        nats = model.log_prob(model.params, test_y, test_features) + logdet
        report(f'{kind} of flowjax', float(nats.mean()), model.size, steps)
    return rows


def table(rows: list[dict]) -> str:
    """Means and standard errors over the seeds, as Markdown."""
    def mean(values):
        error = np.std(values, 0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        return np.mean(values, 0), error

    lines = ['| model | parameters | CPU seconds | steps | nats | below the truth |', '|---|---|---|---|---|---|']
    for name in dict.fromkeys(row['model'] for row in rows):
        own = [row for row in rows if row['model'] == name]
        nats, below = (mean([row[f] for row in own]) for f in ('nats', 'below_truth'))
        lines.append(
            f'| {name} | {own[0]["parameters"]:,} | {mean([r["cpu_seconds"] for r in own])[0]:.0f} | '
            f'{mean([r["steps"] for r in own])[0]:.0f} | {nats[0]:.2f} ± {nats[1]:.2f} | '
            f'{below[0]:.2f} ± {below[1]:.2f} |'
        )
    own = [row for row in rows if 'crps' in row]
    hours = 6 * np.arange(1, T - P + 1)[1::2]
    lines += ['', f'| CRPS at a lead of | {" | ".join(f"{h} h" for h in hours)} |', '|---|' + '---|' * len(hours)]
    for name in own[0]['crps']:
        values, error = mean([row['crps'][name][1::2] for row in own])
        cells = [f'{v:.3f} ± {e:.3f}' for v, e in zip(values, np.broadcast_to(error, values.shape))]
        lines.append(f'| {name} | {" | ".join(cells)} |')
    for level in LEVELS:
        value, error = mean([row['coverage'][str(level)] for row in own])
        lines.append(f'\nCoverage of central {level:.0%} intervals: {value:.3f} ± {error:.3f}')
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--first_seed', type=int, default=0)
    parser.add_argument('--series', type=int, default=20_000)
    parser.add_argument('--width', type=int, default=48)
    parser.add_argument('--blocks', type=int, default=2)
    parser.add_argument('--layers', type=int, default=3)
    parser.add_argument('--steps', type=int, default=600)
    parser.add_argument('--batch_size', type=int, default=128)
    parser.add_argument('--learning_rate', type=float, default=2e-3)
    parser.add_argument('--baseline_learning_rate', type=float, default=2e-3)
    parser.add_argument('--baselines', default='maf,nsf')
    parser.add_argument('--forecasts', type=int, default=200)
    parser.add_argument('--plot', default='')
    flags = parser.parse_args()
    rows = []
    for seed in range(flags.first_seed, flags.first_seed + flags.seeds):
        rows += run(flags, seed)
    print(table(rows))


if __name__ == '__main__':
    main()
