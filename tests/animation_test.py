"""Animated GIFs: how many frames, how long, and what they show."""

import jax.numpy as jnp
import numpy as np
from PIL import Image
from tiny_flow import noise_for, normal, perturbed, tiny

import tarflow_jax as tfj
from tarflow_jax import animation
from tarflow_jax.training.pictures import to_pixels


def test_frames_fade_from_stage_to_stage(tmp_path):
    # Grey levels that the file can have.
    stages = [np.round(normal(i, 3, 4, 4, 1).clip(-1, 1) * 15.5) / 15.5 for i in range(2)]
    animation.save_gif(tmp_path / 'a.gif', stages, columns=10)
    with Image.open(tmp_path / 'a.gif') as gif:
        assert gif.n_frames == 1 + animation.BLEND and gif.info['loop'] == 0
        shown, seconds = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            shown.append(np.asarray(gif.convert('L')))
            seconds.append(gif.info['duration'])
    assert seconds[0] == animation.FIRST and seconds[-1] == animation.LAST
    for stage, frame in ((stages[0], shown[0]), (stages[1], shown[-1])):
        second = to_pixels(stage[1])[..., 0].repeat(2, 0).repeat(2, 1)
        assert abs(frame[:, 12:20].astype(int) - second).max() <= 5  # half a level


def test_stages_are_those_of_the_sampler(tmp_path):
    model = tiny((1, 1))
    variables, noise, labels = perturbed(model), noise_for(model, 2), jnp.array([0, 1])
    guidance = tfj.Guidance(1.0)
    stages = animation.trajectory(
        model, variables, noise, labels, guidance=guidance, denoise=0.1
    )
    assert len(stages) == 4  # noise, two blocks, denoising
    np.testing.assert_allclose(stages[0], model.from_tokens(noise))
    raw = tfj.sample(model, variables, noise, labels, guidance=guidance)
    np.testing.assert_allclose(stages[2], raw, atol=1e-5)
    clean = tfj.denoise(model, variables, raw, labels, noise_std=0.1)
    np.testing.assert_allclose(stages[3], clean, atol=1e-5)
