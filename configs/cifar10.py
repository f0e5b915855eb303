"""CIFAR-10, the most common benchmark of flows: 2-256-8-4, 26M parameters.

    --config=configs/cifar10.py:bpd    unconditional likelihood
    --config=configs/cifar10.py:cond   class-conditional samples

Neither has been trained yet, and the settings are not tuned: the paper has no recipe for this
dataset. The flow is small for the 50,000 images, and trained with flips, as in the paper. `,smoke`
after the variant, or `:smoke` alone, shrinks everything to run in seconds on a CPU.

Published bits/dim of the test set, for comparison with `bpd`:

    RealNVP                                3.49   arXiv 1605.08803
    i-ResNet                               3.45   arXiv 1811.00995
    FFJORD                                 3.40   arXiv 1810.01367
    Glow                                   3.35   arXiv 1807.03039
    Flow++, uniform dequantization         3.29   arXiv 1902.00275
    Flow++, variational dequantization     3.08   arXiv 1902.00275
    score-based model, its probability ODE 2.99   arXiv 2011.13456, which also lists those above
    VDM, a diffusion model                 2.65   arXiv 2107.00630 (2.49 with augmentation)

The score here uses uniform dequantization; compare it only with such numbers. Only flows have exact
likelihoods; the diffusion model's number is a bound.

Cost: 400 epochs are 78,000 steps and 8.4e17 floating-point operations. For a v5e:4x4,
`--mode=compile` predicts 1.0 hours for `bpd` and 0.5 hours for `cond` (16 and 8 chip-hours) at the
roofline of the chip; a real run is slower. On one GPU, the arithmetic takes 7 hours for `bpd` (an
H100 at half of its float32 peak of 67 TFLOP/s) and 0.6 hours for `cond` (at 40% of its bfloat16
peak of 989 TFLOP/s).

Data: CIFAR-10 at 32x32, not resized, from any of the three archives on its site:

    python -m tarflow_jax.data.prepare cifar-10-python.tar.gz --out=data/cifar10

A TFDS dataset prepared as array_record works too:
`--config.data.source=tfds --config.data.name=cifar10 --config.data.path=DIR`.
"""

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
    c.train.validate_every = 2500
    if variant == 'bpd':
        c.train.noise = 'uniform'
    else:
        c.model.update(num_classes=10, dtype='bfloat16')
        c.train.noise_std = 0.05
        c.guidance.update(weight=1.0, annealed=True)
        c.sample.update(method='auto', tolerance=0.01)  # bfloat16 rounding
    return configs.smoke(c) if smoke else c
