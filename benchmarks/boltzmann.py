"""Trains Boltzmann generators: `python benchmarks/boltzmann.py --system=dw4 --seeds=3 --plot=dw4.png`.

--system: 'dw4', four particles in the plane with a double well between each pair, or 'lj13',
thirteen Lennard-Jones particles in a harmonic trap; energies as in bgflow and in Köhler, Klein and
Noé, "Equivariant Flows" (2020), in units of kT. 'lj13_twice' counts each pair twice, as the samples
of Klein, Krämer and Noé, "Equivariant flow matching" (2023) do. Training samples come from
Hamiltonian Monte Carlo of BlackJAX in parallel chains, the held-out ones from later steps of the
chains.

Prints one line of JSON for the reference, one for each seed, and one with the means and standard
errors over the seeds:

    nll: of held-out samples in nats, of numbered particles without a centre of mass, in
        orthonormal coordinates; an upper bound, see `Frame.nll`
    entropy: of the target, in the units of nll, from the normalizer that the annealing estimates
    gap: nll less entropy, the Kullback-Leibler divergence
    ess: effective share of the importance weights; ess_annealed: the same behind annealing with
        resampling; ancestors: share of the samples that have descendants then;
        steps_to_target: steps of annealing that need the flow
    energy_*: means, of the held-out samples, of the flow's reweighted and annealed samples
    tv_*: total variation between the energy histogram and that of the held-out samples

`--symmetry=augmented` shows the flow random permutations; 'ordered' (the default) sorts the
particles, see docs/boltzmann_generators.md. `--save=FILE` only writes the reference samples
[M, N, D] as float32.

Needs BlackJAX (`pip install blackjax`); the plot needs matplotlib.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import tarflow_jax as tfj


def distances(x):
    """Of all pairs: [B, N, D] to [B, N (N - 1) / 2]."""
    i, j = np.triu_indices(x.shape[1], 1)
    return jnp.sqrt(jnp.square(x[:, i] - x[:, j]).sum(2))


def double_well(x):
    """[B]: the sum over pairs of a (d - d0) + b (d - d0)^2 + c (d - d0)^4, tau = 1."""
    r = distances(x) - 4.0
    return (0.9 * r**4 - 4.0 * r**2).sum(1)


def lennard_jones(x, count=1):
    """[B]: (1/d)^12 - 2 (1/d)^6 of all pairs, `count` times, and half the squared distances to the
    centre."""
    s = distances(x) ** -6
    return count * (s * s - 2 * s).sum(1) + 0.5 * jnp.square(centred(x)).sum((1, 2))


def centred(x):
    return x - x.mean(1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class System:
    """A system, and what suits it.

    Args:
      spread: standard deviation of the chains' first positions.
      leapfrogs: of a Hamiltonian step; thin: steps between two samples of a chain.
      energies: range of the histogram; its bins are 60.
      anneal: arguments of `tfj.anneal`, and `samples`, their number.
    """

    energy: Callable
    particles: int
    dimensions: int
    spread: float
    leapfrogs: int
    thin: int
    energies: tuple[float, float]
    flow: dict
    fit: dict
    anneal: dict


SYSTEMS = {
    'dw4': System(
        double_well, 4, 2, spread=2.0, leapfrogs=10, thin=50, energies=(-26.5, -10.0),
        flow=dict(width=32, head_dim=16, layers_per_block=(1,) * 8),
        fit=dict(steps=4000, batch_size=256, learning_rate=2e-3),
        anneal=dict(samples=1000, steps=50),
    ),
    'lj13': System(
        lennard_jones, 13, 3, spread=0.7, leapfrogs=20, thin=20, energies=(-25.0, 30.0),
        flow=dict(width=32, head_dim=16, layers_per_block=(1,) * 8),
        fit=dict(steps=4000, batch_size=128, learning_rate=2e-3),
        anneal=dict(samples=2000, steps=500, keep=0.998),
    ),
}
SYSTEMS['lj13_twice'] = dataclasses.replace(
    SYSTEMS['lj13'], energy=functools.partial(lennard_jones, count=2), energies=(-65.0, 0.0)
)


def reference(system: System, chains: int = 1000, rounds: int = 60, seed: int = 7) -> np.ndarray:
    """Samples of Hamiltonian Monte Carlo, [rounds, chains, N, D], centred."""
    import blackjax

    shape = (system.particles, system.dimensions)

    def log_density(x):  # proper: the centre of mass is Gaussian, too
        return -system.energy(x[None])[0] - 0.5 * x.shape[0] * jnp.square(x.mean(0)).sum()

    def descend(x, _):  # from overlaps to where the gradient is finite
        gradient = jax.grad(lambda x: system.energy(x).sum())(x)
        return x - 0.01 * jnp.clip(gradient, -1, 1), None

    key = jax.random.key(seed)
    x = system.spread * jax.random.normal(key, (chains, *shape))
    x, _ = jax.lax.scan(descend, x, None, length=1000)
    warm_up = blackjax.window_adaptation(
        blackjax.hmc, log_density, num_integration_steps=10, target_acceptance_rate=0.8
    )
    (_, tuned), _ = warm_up.run(key, x[0], 500)
    # One mass: particles are alike.
    mass = jnp.full(math.prod(shape), tuned['inverse_mass_matrix'].mean())
    hmc = blackjax.hmc(log_density, float(tuned['step_size']), mass, system.leapfrogs)

    @jax.jit
    def advance(states, key):
        def step(states, key):
            return jax.vmap(hmc.step)(jax.random.split(key, chains), states)[0], None

        return jax.lax.scan(step, states, jax.random.split(key, system.thin))[0]

    states, kept = jax.vmap(hmc.init)(x), []
    for k in range(10 + rounds):  # ten to forget the start
        states = advance(states, jax.random.fold_in(key, k))
        kept.append(np.asarray(centred(states.position)))
    return np.stack(kept[10:])


@dataclasses.dataclass(frozen=True)
class Frame:
    """The flow's coordinates y [B, N, D] of configurations x [B, N, D], and the target there.

    The energy does not change when a configuration is moved, turned or renumbered, so that any
    density may be chosen for its place, its orientation and its numbering. The target is

        log_target(y) = -energy(x) + log g(place, orientation, numbering) + log |dx / dy|

    Place: the centre of mass of x / scale is Gaussian with deviation 1 / sqrt(N) in each axis.
    'augmented': orientation and numbering are uniform, and y = x / scale.
    'ordered': particles are numbered by their first coordinate, and tokens hold its increments as
    logarithms. In the plane the angle of the principal axis is Gaussian; in space the orientation
    is uniform.
    """

    system: System
    scale: float
    ordered: bool = True
    deviation: float = 0.15  # of the principal axis, radians

    @property
    def turned(self) -> bool:
        return self.ordered and self.system.dimensions == 2

    def augment(self, key, x, condition=None):
        """From centred configurations over `scale` to the flow's coordinates, each time others."""
        turn, order, shift, angle = jax.random.split(key, 4)
        B, N, D = x.shape
        x = x @ jax.random.orthogonal(turn, D, (B,))
        if self.turned:
            by = self.deviation * jax.random.normal(angle, (B,)) - principal_angle(x)
            x = x @ rotation(by)
        number = x[..., 0] if self.ordered else jax.random.uniform(order, (B, N))
        x = jnp.take_along_axis(x, jnp.argsort(number, axis=1)[..., None], axis=1)
        x = x + jax.random.normal(shift, (B, 1, D)) / math.sqrt(N)
        if self.ordered:
            first = x[..., 0]
            increments = jnp.log(jnp.maximum(jnp.diff(first, axis=1), 1e-9))
            x = x.at[:, 1:, 0].set(increments)
        return x, condition

    def positions(self, y):
        """Configurations x [B, N, D], and log |dx / dy| [B] up to the constant of the scale."""
        if not self.ordered:
            return self.scale * y, jnp.zeros(y.shape[0])
        first = jnp.cumsum(jnp.concatenate([y[:, :1, 0], jnp.exp(y[:, 1:, 0])], axis=1), axis=1)
        return self.scale * y.at[..., 0].set(first), y[:, 1:, 0].sum(1)

    def log_target(self, y):
        x, log_determinant = self.positions(y)
        centre = x.mean(1) / self.scale
        value = log_determinant - self.system.energy(x)
        value -= 0.5 * self.system.particles * jnp.square(centre).sum(1)
        if self.turned:
            value -= 0.5 * jnp.square(principal_angle(x) / self.deviation)
        return value

    def nll(self, y, log_prob) -> float:
        """The mean of -log p of centred, numbered particles in orthonormal coordinates, in nats.

        The density of y is that of the configuration, times g and |dx / dy|. The mean of log g over
        the data is known, and is subtracted: for the place, that of the standard normal in
        sqrt(N) centre; for the angle, against uniform over an interval of pi; for the numbering,
        log N!. What the flow does not know of g stays in the nll, which makes it a bound.
        """
        N, D = self.system.particles, self.system.dimensions
        nats = float((self.positions(y)[1] - log_prob).mean())
        nats += (N - 1) * D * math.log(self.scale) - 0.5 * D * math.log(2 * math.pi * math.e)
        if self.ordered:
            nats += math.lgamma(N + 1)
        if self.turned:
            nats += math.log(math.pi) - 0.5 * math.log(2 * math.pi * math.e * self.deviation**2)
        return nats


def principal_angle(x):
    """Of the axis of largest extent in the plane, in [-pi/2, pi/2]: [B, N, 2] to [B]."""
    a, b = jnp.moveaxis(centred(x), 2, 0)
    return 0.5 * jnp.arctan2(2 * (a * b).sum(1), (a * a - b * b).sum(1))


def rotation(angle):
    """[B] to [B, 2, 2], for x @ rotation."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cos, sin], -1), jnp.stack([-sin, cos], -1)], -2)


def histogram(system: System, energies, log_weights=None) -> np.ndarray:
    """Shares of 60 bins; energies outside are in the first and last."""
    weights = None if log_weights is None else np.asarray(jax.nn.softmax(log_weights))
    low, high = system.energies
    found, _ = np.histogram(
        np.clip(np.nan_to_num(energies, nan=high), low, high - 1e-3), 60, (low, high),
        weights=weights,
    )
    return found / found.sum()


def run(system: System, frame: Frame, x, held_out, seed: int, args) -> tuple[dict, dict]:
    """Numbers and histograms of one seed."""
    N, D = system.particles, system.dimensions
    flow = tfj.SequenceFlow(
        length=N, token_dim=D, first_token=args.first_token, scale_limit=args.scale_limit,
        **system.flow,
    )
    key = jax.random.key(seed)
    y_held_out, _ = jax.jit(frame.augment)(jax.random.key(99), held_out / frame.scale)
    began = time.time()
    fitted = tfj.fit(
        flow, x / frame.scale, key=key, augment=frame.augment, held_out=y_held_out[:2000],
        validate_every=max(1, args.steps // 8), **system.fit | {'steps': args.steps},
    )
    minutes = (time.time() - began) / 60
    log_prob = functools.partial(tfj.log_prob, flow, fitted.variables)
    log_p = np.concatenate([log_prob(part) for part in np.split(y_held_out, 10)])

    def draw(k):
        noise = jax.random.normal(jax.random.fold_in(key, k), (1000, N, D))
        return tfj.sample(flow, fitted.variables, noise, return_log_prob=True)

    y, log_q = (jnp.concatenate(a) for a in zip(*(draw(k) for k in range(args.samples // 1000))))
    log_weights = frame.log_target(y) - log_q
    log_weights = jnp.where(jnp.isfinite(log_weights), log_weights, -jnp.inf)

    began = time.time()
    moved = tfj.anneal(
        flow, fitted.variables, frame.log_target, y[: args.annealed], key=jax.random.key(1),
        steps=args.anneal_steps, step_size=1e-3, keep=args.keep,
    )
    to_target = 1 + int((moved.times < 1).sum())
    minutes_annealing = (time.time() - began) / 60

    def energy(y):
        return np.asarray(system.energy(frame.positions(y)[0]))

    def mean(y, log_weights):
        weights = np.asarray(jax.nn.softmax(log_weights))
        return float((weights * np.where(weights > 0, energy(y), 0)).sum())

    bars = {
        'held-out': histogram(system, system.energy(held_out)),
        'flow': histogram(system, energy(y)),
        'reweighted': histogram(system, energy(y), log_weights),
        'annealed': histogram(system, energy(moved.samples), moved.log_weights),
    }
    entropy = float(moved.log_normalizer - frame.log_target(y_held_out).mean())
    nll, gap = frame.nll(y_held_out, log_p), -float(log_p.mean()) - entropy
    share = lambda log_weights: float(tfj.effective_sample_size(log_weights)) / log_weights.size  # noqa: E731
    numbers = {
        'nll': nll,
        'gap': gap,
        'entropy': nll - gap,
        'ess': share(log_weights),
        'ess_annealed': share(moved.log_weights),
        'ancestors': len(np.unique(moved.ancestors)) / args.annealed,
        'steps_to_target': to_target,
        'energy_held_out': float(system.energy(held_out).mean()),
        'energy_reweighted': mean(y, log_weights),
        'energy_annealed': mean(moved.samples, moved.log_weights),
        **{f'tv_{k}': float(0.5 * abs(v - bars['held-out']).sum()) for k, v in bars.items()},
        'minutes': minutes,
        'minutes_annealing': minutes_annealing,
        'parameters': sum(a.size for a in jax.tree.leaves(fitted.variables)),
    }
    return numbers, bars


def plot(path: str, name: str, system: System, all_bars: list[dict]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout='constrained', sharex=True)
    edges = np.linspace(*system.energies, 61)
    colours = {'held-out': 'black', 'flow': 'C7', 'reweighted': 'C1', 'annealed': 'C0'}
    for axis, log in zip(axes, (False, True)):
        for label, colour in colours.items():
            heights = np.mean([bars[label] for bars in all_bars], axis=0) / (edges[1] - edges[0])
            axis.stairs(heights, edges, label=label, color=colour, fill=label == 'held-out',
                        alpha=0.25 if label == 'held-out' else 1.0)
        axis.set(xlabel='energy / kT', ylabel='density')
        if log:
            axis.set(yscale='log', ylim=(1e-5, None))
    axes[0].legend()
    figure.suptitle(f'{name}: mean of {len(all_bars)} seeds; the last bin holds all above it')
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--system', choices=SYSTEMS, default='dw4')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--first_seed', type=int, default=0)
    parser.add_argument('--symmetry', choices=('ordered', 'augmented'), default='ordered')
    parser.add_argument('--first_token', choices=('start', 'identity'), default='start')
    parser.add_argument('--scale_limit', type=float, help='see SequenceFlow')
    parser.add_argument('--steps', type=int, help='of training, in place of the system\'s')
    parser.add_argument('--samples', type=int, default=20_000, help='of the flow')
    parser.add_argument('--annealed', type=int, help='of these, annealed; the system\'s')
    parser.add_argument('--anneal_steps', type=int, help='in place of the system\'s')
    parser.add_argument('--keep', type=float, help='in place of the system\'s, see tfj.anneal')
    parser.add_argument('--reference', help='samples that --save has written')
    parser.add_argument('--save', help='write reference samples to this file, and stop')
    parser.add_argument('--plot', help='write energy histograms to this file')
    args = parser.parse_args()
    system = SYSTEMS[args.system]
    args.steps = args.steps or system.fit['steps']
    args.annealed = args.annealed or system.anneal['samples']
    args.anneal_steps = args.anneal_steps or system.anneal['steps']
    args.keep = args.keep or system.anneal.get('keep')
    began = time.time()
    rounds = np.load(args.reference) if args.reference else reference(system)
    chains = rounds.reshape(-1, 1000, system.particles, system.dimensions)
    print(json.dumps({
        'what': 'reference', 'system': args.system, 'samples': chains.shape[:2],
        'minutes': round((time.time() - began) / 60, 2),
        # Of the first and second half of the chains' steps: equal where they have converged.
        'mean_energy': [float(system.energy(part.reshape(-1, *chains.shape[2:])).mean())
                        for part in np.array_split(chains, 2)],
    }), flush=True)
    if args.save:
        np.save(args.save, chains.reshape(-1, *chains.shape[2:]))
        return
    x, held_out = (part.reshape(-1, *chains.shape[2:]) for part in np.split(chains, [-10]))
    frame = Frame(system, float(x.std()), ordered=args.symmetry == 'ordered')
    numbers, bars = [], []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        found, histograms = run(system, frame, x, held_out, seed, args)
        print(json.dumps({'seed': seed, **found}), flush=True)
        numbers.append(found)
        bars.append(histograms)
    table = {}
    for name in numbers[0]:
        values = [found[name] for found in numbers]
        error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
        table[name] = [float(np.mean(values)), error]
    print(json.dumps({'what': 'mean and standard error', 'system': args.system, **table}))
    if args.plot:
        plot(args.plot, args.system, system, bars)


if __name__ == '__main__':
    main()
