"""A small flow for 64x64 colour images, trained in minutes on a CPU: 4-128-4-2, 1.8M parameters.

    --config=configs/colour64.py --config.data.path=DIR

DIR is a dataset with the splits train and test, prepared with `python -m tarflow_jax.data.prepare
SOURCE --out=DIR --size=64`. The flow is unconditional and trained for likelihood. docs/measured.md
has results for two datasets. `:smoke` shrinks everything to run in seconds on the embedded images.
"""

from tarflow_jax import config as configs


def get_config(arg: str = 'bpd'):
    _, smoke = configs.variant(arg, ('bpd',), default='bpd')
    c = configs.default()
    c.model.update(image_size=64, image_channels=3, patch_size=4, width=128)
    c.model.update(num_classes=0, unroll=2)
    c.model.layers_per_block = (2,) * 4
    c.data.update(source='prepared', test_split='test')
    c.train.update(batch_size=16, epochs=6.0, noise='uniform', warmup_epochs=0.5)
    c.train.update(peak_learning_rate=1e-3, ema_decay=0.99)
    c.train.update(log_every=25, sample_every=400, checkpoint_every=400)
    c.train.update(validate_every=400, validation_images=200)
    c.sample.update(count=36, batch_size=36)
    c.evaluate.update(batch_size=50, draws=4)
    return configs.smoke(c) if smoke else c
