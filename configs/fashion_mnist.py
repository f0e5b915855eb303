"""Fashion-MNIST quickstart."""

from tarflow_jax import config as configs


def get_config():
    c = configs.default()
    c.model.width = 64
    c.model.layers_per_block = (2, 2, 2, 2)
    c.model.unroll = 2
    c.train.batch_size = 128
    c.train.epochs = 10.0
    c.train.peak_learning_rate = 2e-3
    c.train.ema_decay = 0.999
    c.guidance.weight = 2.0
    c.evaluate.metrics = ('bits_per_dim', 'classification')
    return c
