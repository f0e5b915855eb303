"""ImageNet 128x128, class-conditional, the paper's 4-1024-8-8 flow: FID 5.03.

The result is that of Zhai et al. (arXiv 2412.06329, table 4) after 320 epochs, with annealed
guidance 1.5 and denoising strength 0.97. The flow has 824M parameters. Its state is sharded over 4
devices (`mesh.fsdp`) to fit in the 16 GB of a TPU v5e. `:smoke` shrinks everything to run in
seconds on a CPU.

Data: the result is for ImageNet's photographs, resized to 128 pixels on the short side and
centre-cropped, with flips. FOLDER has train/ and val/ with a folder per class, or the site's tars:

    python -m tarflow_jax.data.prepare FOLDER --out=data/imagenet128 --size=128
"""

from tarflow_jax import config as configs


def get_config(arg: str = 'cond'):
    _, smoke = configs.variant(arg, ('cond',), default='cond')
    c = configs.default()
    c.model.update(image_size=128, image_channels=3, patch_size=4, width=1024)
    c.model.update(layers_per_block=(8,) * 8, num_classes=1000, remat='attention', dtype='bfloat16')
    c.data.update(source='prepared', path='data/imagenet128', test_split='validation', flip=True)
    c.data.expects = ('photographs/torchvision',)
    c.train.update(batch_size=768, epochs=320.0, noise_std=0.15)
    c.train.update(log_every=100, sample_every=5000, checkpoint_every=2500)
    c.train.validate_every = 2500
    c.mesh.fsdp = 4
    c.guidance.update(weight=1.5, annealed=True)
    c.sample.update(denoise_strength=0.97, method='auto', tolerance=0.01)
    return configs.smoke(c) if smoke else c
