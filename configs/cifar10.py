"""CIFAR-10, 2-256-8-4."""

from tarflow_jax import config as configs

VARIANTS = ('bpd', 'cond')


def get_config(arg: str = 'bpd'):
    variant, smoke = configs.variant(arg, VARIANTS, default='bpd')
    c = configs.default()
    c.model.update(image_size=32, image_channels=3, patch_size=2, width=256)
    c.model.update(layers_per_block=(4,) * 8, num_classes=0)
    c.data.update(source='prepared', path='data/cifar10', flip=True, expects=('cifar10',))
    c.train.update(batch_size=256, epochs=400.0, peak_learning_rate=5e-4)
    c.train.update(log_every=100, sample_every=5000, checkpoint_every=2500)
    if variant == 'bpd':
        c.train.noise = 'uniform'
    else:
        c.model.update(num_classes=10, dtype='bfloat16')
        c.train.noise_std = 0.05
        c.guidance.update(weight=1.0, annealed=True)
        c.sample.update(method='auto', tolerance=0.01)  # bfloat16 rounds by as much
    return configs.smoke(c) if smoke else c
