"""ImageNet at 64x64, the paper's 2-768-8-8 flow (patch size, width, blocks, layers per block).

    --config=configs/imagenet64.py:bpd      unconditional likelihood: 2.99 bits/dim
    --config=configs/imagenet64.py:uncond   unconditional samples: FID 18.42 (a rerun: 14.67)
    --config=configs/imagenet64.py:cond     class-conditional samples: FID 2.66 (a rerun: 4.21)

The results are those of the original PyTorch code (Zhai et al., arXiv 2412.06329, tables 2 and 3)
after 100 (bpd) or 200 epochs, all with flips. The flow has 460M parameters, 466M with classes.
`,smoke` after the variant, or `:smoke` alone, shrinks everything to run in seconds on a CPU.

Data: the results are for two different datasets. That of `cond` is for ImageNet's photographs,
resized to 64 pixels on the short side and centre-cropped:

    python -m tarflow_jax.data.prepare ILSVRC --size=64 --out=data/imagenet64_cropped

from a folder with train/ and val/ with one folder per class, or the site's tars. Those of `bpd` and
`uncond` are for a downsampled 64x64 dataset (`--dataset=imagenet64` in the official code), most
likely that of the ImageNet site, which is squashed to a square by a box filter and not cropped:

    python -m tarflow_jax.data.prepare FOLDER --out=data/imagenet64

from the folder with train_data_batch_1 to 10, val_data, and map_clsloc.txt for the class names. Its
classes have another order than those of the photographs. Older papers use a third dataset; prepare
it from the folder with train_64x64 and valid_64x64 (it has no labels). Numbers of different
datasets cannot be compared; a run on another dataset than its config states prints a warning. A
TFDS dataset prepared as array_record works too: `--config.data.source=tfds
--config.data.name=imagenet_resized/64x64 --config.data.path=DIR`.
"""

from tarflow_jax import config as configs

VARIANTS = ('bpd', 'uncond', 'cond')


def get_config(arg: str = 'cond'):
    variant, smoke = configs.variant(arg, VARIANTS, default='cond')
    c = configs.default()
    c.model.update(image_size=64, image_channels=3, patch_size=2, width=768)
    c.model.update(layers_per_block=(8,) * 8, num_classes=0, remat='layer')
    c.data.update(source='prepared', path='data/imagenet64', test_split='validation', flip=True)
    c.data.expects = ('imagenet_resized',)
    c.train.update(batch_size=256, log_every=100, sample_every=5000, checkpoint_every=2500)
    c.train.validate_every = 2500
    if variant == 'bpd':
        c.train.update(epochs=100.0, noise='uniform')
        # model.precision='high' halves the passes of a TPU's products: 4360 chip-hours instead of
        # 6140. On a small trained flow it changes bits/dim by at most 6e-5 and gradients by 0.2%
        # (docs/performance.md). Whether a full run reaches the same score has not been tried.
    else:
        c.train.update(epochs=200.0, noise_std=0.05)
        c.model.update(dtype='bfloat16', remat='attention')
        c.mesh.fsdp = 4  # fits into the 16 GB of a TPU v5e; 1 on a single device
        c.sample.update(method='auto', tolerance=0.01)  # bfloat16 rounding
    if variant == 'uncond':
        c.guidance.update(weight=0.2, temperature=0.3)
    if variant == 'cond':
        c.model.num_classes = 1000
        c.data.update(path='data/imagenet64_cropped', expects=('photographs/torchvision',))
        c.guidance.update(weight=2.3, annealed=True)
    return configs.smoke(c) if smoke else c
