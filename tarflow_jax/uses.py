"""More modes of the command line: likelihoods of images, interpolation, completion, animation.

As in `commands`, each function checks what a user can get wrong and returns the work as a closure.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from tarflow_jax import animation, class_order, files, paths, run_checks
from tarflow_jax import command_setup as setup
from tarflow_jax import config as configs
from tarflow_jax.data.image_folder import ImageFolder
from tarflow_jax.evaluation import likelihoods
from tarflow_jax.evaluation.over_set import evenly_spaced
from tarflow_jax.flow.condition import Condition
from tarflow_jax.sampling.completion import complete as complete_examples
from tarflow_jax.sampling.interpolation import interpolate as interpolate_examples
from tarflow_jax.sampling.noise import standard_noise
from tarflow_jax.training import pictures, sharding
from tarflow_jax.training.corruption import to_unit_range

PAIRS, STEPS = 6, 9  # of an interpolation: rows and columns of the picture
COMPLETED, VERSIONS = 8, 4  # images, and completions of each
ANIMATED = 20  # images of a GIF, at most
PARTS = ('upper', 'lower', 'left', 'right', 'border')
MOST_NAMED = 5  # files that are left out and named one by one

log = logging.getLogger('tarflow_jax.commands')


def likelihood(config, given) -> Callable[[], None]:
    """Writes the log density of every image of a folder, or of the test set, to a CSV."""
    run = _Run(config, given, 'likelihood.csv', '.csv')
    needed = run_checks.scoring(config, run.plan, run.mesh, run.source)

    def job():
        e, recipe, source = config.evaluate, run.plan.recipe, run.source
        run.announce(noise=f'{likelihoods.described(recipe)}, {e.draws} draw(s)', memory=needed)
        nats = likelihoods.log_probs(
            run.plan.model, run.variables, source, recipe=recipe, mesh=run.mesh,
            batch_size=e.batch_size, key=jax.random.key(config.seed), draws=e.draws,
        )
        if jax.process_index() == 0:
            labels = [int(source[i]['label']) for i in range(len(source))]
            names = getattr(source, 'names', range(len(source)))
            table = likelihoods.table(
                names, labels, nats, run.plan.model.num_dims, run.plan.conditions.class_names
            )
            files.write_text(run.output, table)
        run.tell_left_out()
        log.info('the log densities of %d images are in %s', len(source), run.output)

    return job


def interpolate(config, given) -> Callable[[], None]:
    """Writes a picture whose rows lead from one image to another."""
    run = _Run(config, given, 'interpolation.png', '.png')
    if len(run.source) < 2:
        raise ValueError('--mode=interpolate needs two images or more; give --images a folder.')

    def job():
        run.announce()
        count = min(PAIRS, len(run.source) // 2)
        images, labels = run.images(count, of=2)
        start, end = (sharding.split(images[i::2], run.mesh) for i in (0, 1))
        # Between two classes no class is right.
        alike = np.where(labels[::2] == labels[1::2], labels[::2], -1).astype(np.int32)
        found = interpolate_examples(
            run.plan.model, run.variables, start, end, run.condition(alike), steps=STEPS,
            denoise=run.plan.denoising, key=jax.random.key(config.seed),
        )
        rows = sharding.to_host(found)[:, :count].swapaxes(0, 1)
        run.save(rows.reshape(-1, *rows.shape[2:]), columns=STEPS)

    return job


def complete(config, given) -> Callable[[], None]:
    """Writes a picture of images of which a part was drawn by the flow."""
    run = _Run(config, given, 'completion.png', '.png', 'known')
    known = known_pixels(given.known or 'upper', run.plan.model.image_shape)

    def job():
        run.announce(known=given.known or 'upper', guidance=f'{run.plan.guidance.weight:g}')
        count = min(COMPLETED, len(run.source))
        images, labels = run.images(count)
        weight = run.plan.guidance.weight
        found, info = complete_examples(
            run.plan.model, run.variables, jax.random.key(config.seed),
            sharding.split(images, run.mesh), known, run.condition(labels), num_samples=VERSIONS,
            guidance=run.plan.guidance if weight > 0 else None, denoise=run.plan.denoising,
            return_info=True,
        )
        if info.exact:
            log.info('the completions are exact draws: the flow reads what is known first')
        else:
            log.info('the completions are the ends of Markov chains, which accepted %.0f%% of '
                     'their proposals', 100 * info.acceptance.mean())
        masked = np.where(known[..., None], images, 0.0)[None]
        rows = np.concatenate([images[None], masked, sharding.to_host(found)])[:, :count]
        run.save(rows.reshape(-1, *rows.shape[2:]), columns=count)

    return job


def write_gif(file: str, plan, variables, mesh, seed: int, count: int) -> None:
    """Writes a GIF of the first images of a set of samples being drawn, guided as the plan says."""
    count = min(count, ANIMATED)
    padded = sharding.round_up(count, mesh)
    condition = sharding.split(plan.conditions.of(np.resize(np.arange(count), padded)), mesh)
    noise = standard_noise(plan.model, jax.random.key(seed), padded)
    stages = animation.trajectory(
        plan.model, variables, noise, condition, guidance=plan.guidance, denoise=plan.denoising
    )
    animation.save_gif(file, [stage[:count] for stage in stages])
    log.info('the way from noise to %d images is in %s', count, file)


def check_gif(file: str | None) -> None:
    """ValueError unless a GIF can be written there."""
    if file is None:
        return
    _one_process('--gif')
    if not file.endswith('.gif'):
        raise ValueError(f'--gif={file} must end with .gif.')
    paths.check_writable_file(file, f'--gif={file}')


def known_pixels(text: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Which pixels --known means: bool [H, W].

    Args:
      text: one of PARTS, or an image file that is white where images are known.
    Raises:
      ValueError: if it is neither, or the file's size is not that of the images.
    """
    (height, width, _), known = image_shape, np.zeros(image_shape[:2], bool)
    if text in PARTS:
        halves = {
            'upper': np.s_[: height // 2], 'lower': np.s_[height // 2 :],
            'left': np.s_[:, : width // 2], 'right': np.s_[:, width // 2 :], 'border': np.s_[:],
        }
        known[halves[text]] = True
        if text == 'border':
            known[height // 4 : height - height // 4, width // 4 : width - width // 4] = False
        return known
    try:
        with Image.open(text) as image:
            mask = np.asarray(image.convert('L')) > 127
    except OSError as error:
        raise ValueError(
            f'--known={text} is none of {", ".join(PARTS)}, and no image file can be read there; '
            'give one of these, or an image that is white where pixels are known.'
        ) from error
    if mask.shape != known.shape:
        raise ValueError(
            f'--known={text} is {mask.shape[0]}x{mask.shape[1]} (height x width), and the images '
            f'are {height}x{width}; resize it.'
        )
    return mask


def _one_process(what: str) -> None:
    if jax.process_count() > 1:
        raise ValueError(f'{what} is for one process; start it alone.')


class _Run:
    """What these modes have in common: a flow, images, and the file to write.

    Args:
      name: of the file in the workdir that is written without --output.
      suffix: of the file.
      flags: beside those that all have.
    """

    def __init__(self, config, given, name: str, suffix: str, *flags: str):
        workdir, plan, mesh = setup.of(config, given, 'input', 'images', 'output', *flags)
        if given.mode != 'likelihood':
            _one_process(f'--mode={given.mode}')
        self.mode, self.mesh, self.workdir = given.mode, mesh, workdir
        self.output = given.output or str(workdir / name)
        if not self.output.endswith(suffix):
            raise ValueError(f'--output={self.output} must end with {suffix}.')
        paths.check_writable_file(self.output, f'--output={self.output}')
        self.variables, self.origin, known = setup.variables_of(plan, workdir, given.input, mesh)
        if given.images:
            if plan.model.num_features:
                raise ValueError(
                    f'--images={given.images} has no features, and this flow is conditioned on '
                    'them; leave it out to take the test set.'
                )
            self.variables, known = class_order.at_hand(
                config.data, plan.model, self.variables, known, self.origin
            )
            names, folder = known.known_names, Path(given.images).expanduser()
            self.source = ImageFolder(
                folder, plan.model.image_shape, names, plan.model.num_classes
            )
        else:
            self.source = configs.source(config, 'test', plan.model)
            self.variables = class_order.in_order(
                plan.model, self.variables, known, self.source, self.origin
            )
            names = self.source.class_names
        self.plan = plan.with_class_names(names)

    def announce(self, **rows: str) -> None:
        setup.announce(
            self.mode, self.plan.model, self.mesh, checkpoint=self.origin['name'],
            images=run_checks.set_name(self.source), **rows, output=self.output,
        )

    def images(self, count: int, of: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Images in [-1, 1] and labels, `count` groups `of` so many, from all of the source.

        The first groups are repeated at the end, up to a number that the mesh can split.
        """
        view = evenly_spaced(self.source, count * of)
        padded = np.resize(np.arange(count * of), sharding.round_up(count, self.mesh) * of)
        chosen = [view[i] for i in padded]
        images = np.stack([one['image'] for one in chosen])
        labels = np.array([one['label'] for one in chosen], np.int32)
        return np.asarray(to_unit_range(images)), labels

    def condition(self, labels: np.ndarray) -> Condition:
        """The condition of images with these labels, on the devices."""
        condition = self.plan.conditions.of(
            np.arange(len(labels)), labels if self.plan.model.num_classes else None
        )
        return sharding.split(condition, self.mesh)

    def save(self, images: np.ndarray, columns: int) -> None:
        """Writes a picture of images in rows."""
        picture = pictures.sheet(pictures.to_pixels(images), columns, None)
        pictures.save_png(self.output, picture)
        self.tell_left_out()
        log.info('the picture is %s', self.output)

    def tell_left_out(self) -> None:
        """Says which files of the folder were left out or changed."""
        problems = getattr(self.source, 'problems', [])
        for name, reason in problems[:MOST_NAMED]:
            log.warning('left out: %s %s', name, reason)
        if len(problems) > MOST_NAMED:
            log.warning('left out: %d more files', len(problems) - MOST_NAMED)
        counts: dict[str, int] = {}
        for _, note in getattr(self.source, 'notes', []):
            kind = 'is smaller, and was enlarged' if 'was enlarged' in note else note
            counts[kind] = counts.get(kind, 0) + 1
        for note, count in counts.items():
            log.info('%d of the images: each %s', count, note)
