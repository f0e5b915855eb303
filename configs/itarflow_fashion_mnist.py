"""Fashion-MNIST, class-conditional: a small iTARFlow on the 10,000 embedded images.

This is the flow of the quickstart (fashion_mnist.py), 7-64-4-2, conditioned on the noise level and
trained at all levels from 0.01 to 0.1 (Chen et al., arXiv 2604.20041). It has 0.6M parameters,
trains as long as the quickstart, and classifies 81% of the test images. It samples at the highest
level and denoises in 5 steps; more are no better. Unlike the large configs, it averages the
parameters, clips gradients, and has blocks of equal depth, which is better at this size
(docs/itarflow.md).
"""

from tarflow_jax import config as configs


def get_config():
    c = configs.default()
    c.model.update(patch_size=7, width=64, layers_per_block=(2, 2, 2, 2), unroll=2)
    c.model.noise_conditioned = True
    c.data.expects = ('embedded',)
    c.train.update(batch_size=64, epochs=41.5, warmup_epochs=2.0, peak_learning_rate=4e-3)
    c.train.update(noise='levels', noise_std=0.1, lowest_noise_std=0.01, ema_decay=0.999)
    c.train.update(log_every=100, sample_every=2000, checkpoint_every=1000)
    c.guidance.update(weight=2.0, rule='starflow')
    c.sample.denoise_steps = 5
    c.evaluate.metrics = ('levels', 'classification')
    return c
