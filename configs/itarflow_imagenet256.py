"""ImageNet 256x256, class-conditional, the iTARFlow 8-2176-(4,4,4,24): published FID unknown.

Chen et al., "Normalizing Flows with Iterative Denoising" (arXiv 2604.20041): a flow conditioned on
its noise level, trained at all levels from 0.01 to 0.7 for 600 epochs. It samples at the highest
level with annealed guidance 4.2, and denoises along the score of the flow in 70 steps. The flow has
2221M parameters. `:smoke` shrinks everything to run in seconds on a CPU.

Data: ImageNet's photographs, from train/ and val/ with one folder per class, or from the site's tar
of tars, resized to 256 pixels on the short side and centre-cropped:

    python -m tarflow_jax.data.prepare FOLDER --out=data/imagenet256 --size=256
"""

from tarflow_jax import config as configs


def get_config(arg: str = 'cond'):
    _, smoke = configs.variant(arg, ('cond',), default='cond')
    c = configs.default()
    c.model.update(image_size=256, image_channels=3, patch_size=8, width=2176)
    c.model.update(layers_per_block=(4, 4, 4, 24), num_classes=1000, noise_conditioned=True)
    # The residual stream stays in float32 (the default), as in the official autocast.
    c.model.update(dtype='bfloat16', remat='attention')
    c.data.update(source='prepared', path='data/imagenet256', test_split='validation')
    c.data.update(flip=True, expects=('photographs/torchvision',))
    c.train.update(batch_size=512, epochs=600.0, floor_learning_rate=1e-5, label_dropout=0.0)
    c.train.update(noise='levels', noise_std=0.7, lowest_noise_std=0.01, weight='level')
    # The recipe uses no averaging and no clipping. The loss weights, 0.355 on average, scale the
    # gradients too, so a clip_norm of 1 would limit them less than those of a TarFlow.
    c.train.update(ema_decay=0.0, clip_norm=0.0)
    c.train.update(log_every=100, sample_every=5000, checkpoint_every=2500)
    c.train.validate_every = 2500
    c.mesh.fsdp = 8
    c.guidance.update(weight=4.2, annealed=True, rule='linear_sigma')
    c.sample.update(method='auto', tolerance=0.01, batch_size=256)  # bfloat16 rounding
    # With three passes per float32 product on TPU, samples are within 1e-5 of those with six,
    # with one pass within 5e-3 (docs/performance.md, a small trained flow).
    c.sample.denoise_precision = 'high'
    return configs.smoke(c) if smoke else c
