"""What the report draws from a flow: samples, a guidance sweep, the way through the blocks.

All of it begins from one array of noise, so that pictures can be compared across the page. Nothing
is drawn again here: an image that is not finite is shown as one, and counted.

Shape suffixes: R rows, N columns, T patches, D numbers in a patch; B is R * N or R.
"""

import dataclasses

import jax
import numpy as np

from tarflow_jax.flow.condition import rows as rows_of
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.sampling.generate import denoised
from tarflow_jax.sampling.sample import sample, sample_trajectory
from tarflow_jax.training import sharding

# Of flows without classes where the config names none: the one that the guidance suggests.
TEMPERATURE = 0.3
FILM_ROWS, FILM_COLUMNS = 4, 8


@dataclasses.dataclass(frozen=True)
class Drawer:
    """A flow as the report draws from it: host arrays of any batch size in and out.

    Args:
      plan: a `config.Plan`; its flow is laid out over `mesh`.
      batch_size: of unguided images; all are drawn in batches of it, so that one program serves.
    """

    plan: object
    variables: object
    mesh: jax.sharding.Mesh
    batch_size: int

    def trajectory(self, noise, condition, guidance: Guidance | None = None) -> list[np.ndarray]:
        """The noise and what each block makes of it, as sampling goes: pictures [B, H, W, C]."""
        model = self.plan.model
        size = self.batch_size if guidance is None else min(len(noise), self.batch_size)

        def way(noise, condition):
            return sample_trajectory(model, self.variables, noise, condition, guidance=guidance)

        return [model.from_tokens(x) for x in self._batched(way, size, noise, condition)]

    def clean(self, images, condition) -> np.ndarray:
        """The images [B, H, W, C] denoised, where the plan denoises."""
        plan = self.plan
        if not plan.denoising:
            return images

        def step(images, condition):
            return denoised(plan.model, self.variables, images, condition, plan.denoising)

        return self._batched(step, self.batch_size, images, condition)

    def film(self, images, condition) -> np.ndarray:
        """The images [B, H, W, C] on their way down the noise levels: [B, N + 1, H, W, C]."""
        plan = self.plan

        def way(images, condition):
            path = denoised(
                plan.model, self.variables, images, condition, plan.denoising, return_path=True
            )
            return path.swapaxes(0, 1)

        return self._batched(way, len(images), images, condition)

    def iterations(self, noise, condition) -> dict[str, np.ndarray]:
        """How parallel decoding gets on with this noise; see `sampling.sample.SampleInfo`.

        Returns:
          'calls' int [blocks, B], 'residual' [blocks, B], 'round_trip' [B], 'sequential' bool [B].
        """
        count, size = len(noise), sharding.round_up(len(noise), self.mesh)
        noise, condition = self._split(noise, size), self._split(condition, size)
        _, info = sample(
            self.plan.model, self.variables, noise, condition, method='jacobi', return_info=True
        )
        info = jax.tree.map(lambda x: np.asarray(sharding.to_host(x))[..., :count], info)
        return {
            'calls': info.iterations, 'residual': info.residual, 'round_trip': info.round_trip,
            'sequential': info.sequential,
        }

    def _batched(self, function, size, first, condition):
        size = sharding.round_up(size, self.mesh)
        parts = []
        for start in range(0, len(first), size):
            rows = slice(start, start + size)
            own = rows_of(condition, rows)
            found = function(self._split(first[rows], size), self._split(own, size))
            parts.append(jax.tree.map(lambda x: sharding.to_host(x), found))
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(first)], *parts)

    def _split(self, tree, size: int):
        """Arrays [B, ...], filled up to `size` with their own rows, split over the mesh."""
        def filled(x):
            return np.asarray(x)[np.arange(size) % len(x)] if np.ndim(x) else x

        return sharding.split(jax.tree.map(filled, tree), self.mesh)


def row_labels(num_classes: int, rows: int) -> np.ndarray | None:
    """A class for each row, evenly spaced among all: int32 [R], R at most `rows`; None without."""
    if num_classes == 0:
        return None
    rows = min(rows, num_classes)
    return (np.arange(rows) * num_classes // rows).astype(np.int32)


def noise_of(key, rows: int, columns: int, model) -> np.ndarray:
    """Standard normal noise [R * N, T, D], row by row."""
    shape = (rows * columns, *model.token_shape)
    return np.asarray(jax.random.normal(key, shape))


def between(start_BxTxD, end_BxTxD, steps: int) -> np.ndarray:
    """Points on the arc from one noise to another: [steps, B, T, D], both ends included.

    In many dimensions nearly all of a Gaussian lies in a thin shell, which a straight line leaves:
    its middle is shorter by a factor of sqrt(2), where the flow has seen next to nothing.
    """
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (start_BxTxD, end_BxTxD))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    angle = np.arccos(np.clip((a * b).sum(1) / lengths, -1, 1))[:, None]
    # Parallel ends leave the arc without a plane; there it is the line between them.
    flat = np.sin(angle) < 1e-6
    divisor = np.where(flat, 1, np.sin(angle))
    points = []
    for t in np.linspace(0, 1, steps):
        first = np.where(flat, 1 - t, np.sin((1 - t) * angle) / divisor)
        second = np.where(flat, t, np.sin(t * angle) / divisor)
        points.append((first * a + second * b).reshape(np.shape(start_BxTxD)))
    return np.stack(points).astype(np.float32)


def sweep_guidance(guidance: Guidance, conditional: bool) -> Guidance:
    """The guidance whose weight the sweep varies: the config's, or one that does something."""
    if conditional or guidance.temperature != 1:
        return guidance
    return dataclasses.replace(guidance, weight=0.0, temperature=TEMPERATURE)


def sweep_weights(guidance: Guidance, weights) -> list[float]:
    """The weights in order, those asked for and the config's own; 0 is drawn already."""
    return sorted({float(w) for w in (*weights, guidance.weight)} - {0.0})


def draw(drawer: Drawer, key, *, rows: int, columns: int, weights, steps: int) -> dict:
    """Everything that the report shows of sampling, pictures as float32 [..., H, W, C] in [-1, 1].

    Returns:
      'labels' [R] or None; 'raw' and, where the flow denoises, 'denoised' [R, N, ...]; 'guided',
      {weight: [R, ...]} of the first column's noise with 'guidance'; 'trajectory'
      [blocks + 1, R, ...] of the first column, noise first; 'between' [R, steps, ...] from the
      first column to the second (empty with one column); 'iterations', see
      `Drawer.iterations`, of the first column; 'not_finite', images in 'raw' that are not finite;
      of noise-conditioned flows 'film' [R, levels, ...], the first column's first rows at some of
      the 'film_levels' that denoising goes through, from the sample to the result at level 0.
    """
    model = drawer.plan.model
    labels = row_labels(model.num_classes, rows)
    rows = rows if labels is None else len(labels)
    noise = noise_of(key, rows, columns, model)

    def condition_of(count: int, repeats: int):
        """Of the first `count` rows, `repeats` times each."""
        own = None if labels is None else labels[:count].repeat(repeats)
        return drawer.plan.conditions.of(np.arange(count).repeat(repeats), own)

    each, first = condition_of(rows, columns), condition_of(rows, 1)
    way = [x.reshape(rows, columns, *x.shape[1:]) for x in drawer.trajectory(noise, each)]
    grid = way[-1]
    found = {
        'labels': labels,
        'raw': grid,
        'trajectory': np.stack([x[:, 0] for x in way]),
        'not_finite': int((~np.isfinite(grid).all((2, 3, 4))).sum()),
    }
    if drawer.plan.denoising:
        clean = drawer.clean(grid.reshape(-1, *grid.shape[2:]), each)
        found['denoised'] = clean.reshape(grid.shape)
        if drawer.plan.denoising.levels:
            few = min(rows, FILM_ROWS)
            levels = np.append(drawer.plan.denoising.levels, 0.0)
            shown = np.linspace(0, levels.size - 1, min(FILM_COLUMNS, levels.size)).round()
            film = drawer.film(grid[:few, 0], condition_of(few, 1))
            found['film'] = film[:, shown.astype(int)]
            found['film_levels'] = levels[shown.astype(int)]
    noise = noise.reshape(rows, columns, *noise.shape[1:])
    guidance = sweep_guidance(drawer.plan.guidance, model.conditional)
    found['guidance'], found['guided'] = guidance, {0.0: found.get('denoised', grid)[:, 0]}
    for weight in sweep_weights(drawer.plan.guidance, weights):
        guided = dataclasses.replace(guidance, weight=weight)
        images = drawer.trajectory(noise[:, 0], first, guided)[-1]
        found['guided'][weight] = drawer.clean(images, first)
    found['between'] = np.zeros((0, steps, *grid.shape[2:]), np.float32)
    if columns > 1:
        few = min(rows, 4)
        arc = between(noise[:few, 0], noise[:few, 1], steps).swapaxes(0, 1)
        own = condition_of(few, steps)
        images = drawer.trajectory(arc.reshape(-1, *arc.shape[2:]), own)[-1]
        found['between'] = drawer.clean(images, own).reshape(few, steps, *grid.shape[2:])
    found['iterations'] = drawer.iterations(noise[:, 0], first)
    return found
