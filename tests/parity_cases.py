"""The numbers that the official code returned, in our layout (tests/parity)."""

import functools
import json
from pathlib import Path

import numpy as np

import tarflow_jax as tfj

FOLDER = Path(__file__).parent / 'parity'
CASES = ('cond_gray', 'uncond_rgb', 'vp_cond')
ITARFLOW_CASES = ('itarflow_cond_rgb', 'itarflow_uncond_gray')
TARGETS = {'ab': 'both', 'a': 'log_scale', 'b': 'shift'}
RULES = {'tarflow': 'linear_sigma', 'starflow': 'starflow'}


class Case:
    """One recorded case: `model`, `variables`, and its arrays with images as [B, H, W, C]."""

    def __init__(self, name: str, checkpoint: str = 'model.pth', **fields):
        self.arrays = dict(np.load(FOLDER / name / 'case.npz'))
        self.config = config = json.loads(str(self.arrays['config']))
        depths = config['layers_per_block']
        patch_size = config['patch_sizes'][0] if 'patch_sizes' in config else config['patch_size']
        width = config['channels'][0] if 'patch_sizes' in config else config['channels']
        self.model = tfj.TarFlow(
            image_size=config['img_size'],
            image_channels=config['in_channels'],
            patch_size=patch_size,
            width=width,
            layers_per_block=tuple(depths) if isinstance(depths, list) else (depths,) * config['num_blocks'],
            num_classes=config['num_classes'],
            volume_preserving=not config.get('nvp', True),
            noise_conditioned=name.startswith('itarflow'),
            **fields,
        )
        self.variables = tfj.load_official(FOLDER / name / checkpoint, self.model)

    def __contains__(self, name):
        return name in self.arrays

    def __getitem__(self, name):
        return self.arrays[name]

    def images(self, name: str) -> np.ndarray:
        """[..., C, H, W] as [..., H, W, C]."""
        return np.moveaxis(self.arrays[name], -3, -1)

    def sequence(self, name: str) -> np.ndarray:
        """[..., T, (channel, row, column)] as [..., T, (row, column, channel)]."""
        p, c = self.model.patch_size, self.model.image_channels
        x = self.arrays[name]
        split = x.reshape(*x.shape[:-1], c, p, p)
        return np.moveaxis(split, -3, -1).reshape(x.shape)

    def labels(self, name: str = 'y'):
        return self.arrays[name].astype(np.int32) if name in self.arrays else None

    def condition(self, labels: str = 'y', noise_std=None):
        """The named labels and, of noise-conditioned flows, the level `t` of each image or another."""
        if not self.model.noise_conditioned:
            return self.labels(labels)
        return tfj.Condition(self.labels(labels), self['t'] if noise_std is None else noise_std)


def official_guidance(c: Case, tag: str) -> tfj.Guidance:
    """That of the recorded samples of a tag."""
    k = json.loads(str(c[f'kwargs_{tag}']))
    given = dict(
        weight=k['guidance'], temperature=k.get('attn_temp', 1.0),
        annealed=k.get('annealed_guidance', False),
    )
    if not c.model.noise_conditioned:
        return tfj.Guidance(target=TARGETS[k['guide_what']], **given)
    style = k.get('lerp_style', 'tarflow')
    # The official starflow rule guides the first block only.
    return tfj.Guidance(rule=RULES[style], blocks=1 if style == 'starflow' else k.get('guide_flows'), **given)


def official_condition(c: Case):
    """That of the recorded samples, at the highest level."""
    return c.condition(noise_std=c.config.get('t1'))


@functools.cache
def case(name: str) -> Case:
    """A case that tests share, and do not change."""
    return Case(name)


def relative_error(found, wanted) -> float:
    """Largest difference over the largest magnitude."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
