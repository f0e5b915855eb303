"""The numbers that the official code returned, in our layout (tests/parity)."""

import json
from pathlib import Path

import numpy as np

import tarflow_jax as tfj

FOLDER = Path(__file__).parent / 'parity'
CASES = ('cond_gray', 'uncond_rgb', 'vp_cond')


class Case:
    """One recorded case: `model`, `variables`, and its arrays with images as [B, H, W, C]."""

    def __init__(self, name: str, checkpoint: str = 'model.pth', **fields):
        self.arrays = dict(np.load(FOLDER / name / 'case.npz'))
        config = json.loads(str(self.arrays['config']))
        self.model = tfj.TarFlow(
            image_size=config['img_size'],
            image_channels=config['in_channels'],
            patch_size=config['patch_size'],
            width=config['channels'],
            layers_per_block=(config['layers_per_block'],) * config['num_blocks'],
            num_classes=config['num_classes'],
            volume_preserving=not config['nvp'],
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


def relative_error(found, wanted) -> float:
    """Largest difference over the largest magnitude."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
