"""Draws what the report shows of sampling: samples, a guidance sweep, every stage of sampling.

All of it starts from one array of noise, so that pictures can be compared across the page. Images
that are not finite are not drawn again: the page shows and counts them.

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

TEMPERATURE = 0.3  # of the sweep, for flows without classes whose config has none
MOST_LEVELS = 24  # noise levels in the film of denoising
MOST_MOMENTS = 36  # pictures in the film of sampling


@dataclasses.dataclass(frozen=True)
class Drawer:
    """Draws from a flow; takes and returns host arrays of any batch size.

    Args:
      plan: a `config.Plan` whose flow is laid out over `mesh`.
      batch_size: images are drawn in batches of this size, so that few programs are compiled.
    """

    plan: object
    variables: object
    mesh: jax.sharding.Mesh
    batch_size: int

    def trajectory(self, noise, condition, guidance: Guidance | None = None) -> list[np.ndarray]:
        """Returns the noise and the output of each block, in order of sampling: [B, H, W, C]."""
        model = self.plan.model

        def way(noise, condition):
            return sample_trajectory(model, self.variables, noise, condition, guidance=guidance)

        return [model.from_tokens(x) for x in self._batched(way, noise, condition)]

    def clean(self, images, condition) -> np.ndarray:
        """Denoises images [B, H, W, C]; returns them unchanged if the plan does not denoise."""
        plan = self.plan
        if not plan.denoising:
            return images

        def step(images, condition):
            return denoised(plan.model, self.variables, images, condition, plan.denoising)

        return self._batched(step, images, condition)

    def film(self, images, condition) -> np.ndarray:
        """Returns the images [B, H, W, C] at each level of denoising: [B, levels + 1, H, W, C]."""
        plan = self.plan

        def way(images, condition):
            path = denoised(
                plan.model, self.variables, images, condition, plan.denoising, return_path=True
            )
            return path.swapaxes(0, 1)

        return self._batched(way, images, condition)

    def iterations(self, noise, condition) -> dict[str, np.ndarray]:
        """Decodes this noise in parallel and returns how it went; see `sampling.sample.SampleInfo`.

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

    def _batched(self, function, first, condition):
        size = sharding.round_up(self.batch_size, self.mesh)
        parts = []
        for start in range(0, len(first), size):
            rows = slice(start, start + size)
            own = rows_of(condition, rows)
            found = function(self._split(first[rows], size), self._split(own, size))
            parts.append(jax.tree.map(lambda x: sharding.to_host(x), found))
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(first)], *parts)

    def _split(self, tree, size: int):
        """Fills arrays [B, ...] up to `size` with their own rows and splits them over the mesh."""
        def filled(x):
            return np.asarray(x)[np.arange(size) % len(x)] if np.ndim(x) else x

        return sharding.split(jax.tree.map(filled, tree), self.mesh)


def row_labels(num_classes: int, rows: int) -> np.ndarray | None:
    """Returns evenly spaced classes, one a row: int32 [R], R <= rows; None without classes."""
    if num_classes == 0:
        return None
    rows = min(rows, num_classes)
    return (np.arange(rows) * num_classes // rows).astype(np.int32)


def noise_of(key, rows: int, columns: int, model) -> np.ndarray:
    """Draws standard normal noise [R * N, T, D], row by row."""
    shape = (rows * columns, *model.token_shape)
    return np.asarray(jax.random.normal(key, shape))


def between(start_BxTxD, end_BxTxD, steps: int) -> np.ndarray:
    """Interpolates on the arc from one noise to another: [steps, B, T, D], both ends included.

    In many dimensions nearly all of a Gaussian lies in a thin shell. A straight line leaves it: its
    midpoint is shorter by a factor of sqrt(2), where the flow has seen almost no data.
    """
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (start_BxTxD, end_BxTxD))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    angle = np.arccos(np.clip((a * b).sum(1) / lengths, -1, 1))[:, None]
    # Parallel ends define no arc; they are interpolated on the line between them.
    flat = np.sin(angle) < 1e-6
    divisor = np.where(flat, 1, np.sin(angle))
    points = []
    for t in np.linspace(0, 1, steps):
        first = np.where(flat, 1 - t, np.sin((1 - t) * angle) / divisor)
        second = np.where(flat, t, np.sin(t * angle) / divisor)
        points.append((first * a + second * b).reshape(np.shape(start_BxTxD)))
    return np.stack(points).astype(np.float32)


def sweep_guidance(guidance: Guidance, conditional: bool) -> Guidance:
    """Returns the guidance whose weight the sweep varies: the config's, or one with an effect."""
    if conditional or guidance.temperature != 1:
        return guidance
    return dataclasses.replace(guidance, weight=0.0, temperature=TEMPERATURE)


def sweep_weights(guidance: Guidance, weights) -> list[float]:
    """Returns the weights of the sweep in order: 0, those asked for, and the config's own."""
    return sorted({0.0, guidance.weight, *map(float, weights)})


def own_scale(images) -> np.ndarray:
    """Scales numbers of any size [N, H, W, C] to about [-1, 1]; only the largest 1% exceed it."""
    finite = np.abs(images[np.isfinite(images)])
    return images / max(np.quantile(finite, 0.99), 1e-12) if finite.size else images


def moments(model, way, most: int = MOST_MOMENTS) -> tuple[np.ndarray, list[str]]:
    """Returns pictures of sampling patch by patch, and what to call each.

    A block inverts one patch after another in its own order. Between two blocks, the patches that
    are done come from the later stage and the rest from the earlier one.

    Args:
      way: [blocks + 1, R, H, W, C], the noise and the output of each block, in order of sampling.
      most: pictures at most, the noise and the result included, but at least one for each block.
    Returns:
      ([F, R, H, W, C] in [-1, 1], F names).
    """
    length, size = model.token_shape
    orders = [_order(order, length) for order in model.block_orders()]
    blocks = len(orders)
    parts = max(1, min(length, (most - 1) // blocks))
    scaled = [own_scale(x) for x in way[:-1]] + [way[-1]]
    pictures, names = [scaled[0]], ['noise']
    for step, block in enumerate(reversed(range(blocks))):
        for part in range(1, parts + 1):
            done = np.zeros((1, length, size), bool)
            done[:, orders[block][: length * part // parts]] = True
            mask = np.asarray(model.from_tokens(done))
            pictures.append(np.where(mask, scaled[step + 1], scaled[step]))
            names.append(f'block {block}, {part / parts:.0%} of the patches')
    return np.stack(pictures), names


def _order(order, length: int) -> np.ndarray:
    """The tokens of a block in the order in which it reads them."""
    if np.ndim(order):
        return np.asarray(order)
    return np.arange(length)[::-1] if order else np.arange(length)


def draw(drawer: Drawer, key, *, rows: int, columns: int, weights, steps: int) -> dict:
    """Draws everything the report shows of sampling.

    All pictures are float32 [..., H, W, C] in [-1, 1]. All but 'guided' have the guidance of the
    plan.

    Returns:
      'labels': [R], the class of each row, or None.
      'raw', and 'denoised' if the flow denoises: samples [R, N, ...].
      'trajectory': [blocks + 1, R, ...], the first column's noise and the output of each block.
      'moments', 'moment_names': see `moments`, of the same.
      'sweep': the guidance whose weight varies in 'guided', {weight: [R, ...]}, which is the first
        column under each weight.
      'between': [R, steps, ...] from the first column to the second; empty if there is one column.
      'iterations': see `Drawer.iterations`, of the first column without guidance.
      'not_finite': the number of images in 'raw' that are not finite.
      'film', 'film_levels': only of noise-conditioned flows, [R, levels, ...], the first column at
        some of the levels of denoising, from the sample to the result at level 0.
    """
    plan = drawer.plan
    model, own = plan.model, plan.guidance if plan.guidance.weight else None
    labels = row_labels(model.num_classes, rows)
    rows = rows if labels is None else len(labels)
    noise = noise_of(key, rows, columns, model)

    def condition_of(count: int, repeats: int):
        """The condition of the first `count` rows, `repeats` times each."""
        given = None if labels is None else labels[:count].repeat(repeats)
        return plan.conditions.of(np.arange(count).repeat(repeats), given)

    each, first = condition_of(rows, columns), condition_of(rows, 1)
    way = [
        x.reshape(rows, columns, *x.shape[1:]) for x in drawer.trajectory(noise, each, own)
    ]
    grid = way[-1]
    found = {
        'labels': labels,
        'raw': grid,
        'trajectory': np.stack([x[:, 0] for x in way]),
        'not_finite': int((~np.isfinite(grid).all((2, 3, 4))).sum()),
    }
    found['moments'], found['moment_names'] = moments(model, found['trajectory'])
    finished = grid
    if plan.denoising:
        finished = drawer.clean(grid.reshape(-1, *grid.shape[2:]), each).reshape(grid.shape)
        found['denoised'] = finished
        if plan.denoising.levels:
            levels = np.append(plan.denoising.levels, 0.0)
            count = min(MOST_LEVELS, levels.size)
            shown = np.linspace(0, levels.size - 1, count).round().astype(int)
            found['film'] = drawer.film(grid[:, 0], first)[:, shown]
            found['film_levels'] = levels[shown]
    noise = noise.reshape(rows, columns, *noise.shape[1:])
    found['sweep'] = sweep_guidance(plan.guidance, model.conditional)
    found['guided'] = {}
    for weight in sweep_weights(plan.guidance, weights):
        if weight == plan.guidance.weight:
            found['guided'][weight] = finished[:, 0]
            continue
        guidance = dataclasses.replace(found['sweep'], weight=weight) if weight else None
        images = drawer.trajectory(noise[:, 0], first, guidance)[-1]
        found['guided'][weight] = drawer.clean(images, first)
    found['between'] = np.zeros((0, steps, *grid.shape[2:]), np.float32)
    if columns > 1:
        few = min(rows, 4)
        arc = between(noise[:few, 0], noise[:few, 1], steps).swapaxes(0, 1)
        given = condition_of(few, steps)
        images = drawer.trajectory(arc.reshape(-1, *arc.shape[2:]), given, own)[-1]
        found['between'] = drawer.clean(images, given).reshape(few, steps, *grid.shape[2:])
    found['iterations'] = drawer.iterations(noise[:, 0], first)
    return found
