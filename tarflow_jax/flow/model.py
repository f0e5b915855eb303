"""TarFlow: a normalizing flow made of causal Transformers over image patches.

Zhai et al., "Normalizing Flows are Capable Generative Models", ICML 2025 (arXiv 2412.06329).

Shape suffixes: B images, T patches, D numbers in a patch, C width.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from tarflow_jax.flow.attention import Array, at_least_float32
from tarflow_jax.flow.layers import Layer, Linear, OneDevice

Variables = Mapping[str, Any]  # what `TarFlow.init` returns

# What a layer keeps of its forward pass beside its input; the rest is recomputed.
REMAT_POLICIES = {
    'none': jax.checkpoint_policies.everything_saveable,
    'layer': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'attention': jax.checkpoint_policies.save_only_these_names('attention'),
}


def patchify(images_BxHxWxC: Array, patch_size: int) -> Array:
    """Images [B, H, W, C] to patches [B, T, D], raster order; in a patch (row, column, channel)."""
    B, H, W, C = images_BxHxWxC.shape
    p = patch_size
    x = images_BxHxWxC.reshape(B, H // p, p, W // p, p, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(x_BxTxD: Array, patch_size: int, image_size: int) -> Array:
    """Patches [B, T, D] to images [B, image_size, image_size, C]: the inverse of `patchify`."""
    B, T, D = x_BxTxD.shape
    p, n = patch_size, image_size // patch_size
    x = x_BxTxD.reshape(B, n, n, p, p, D // (p * p))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, image_size, image_size, D // (p * p))


def flip_if(reverse, x: Array, axis: int) -> Array:
    """x with `axis` reversed if `reverse`, a Python or a traced boolean."""
    if isinstance(reverse, bool):
        return jnp.flip(x, axis) if reverse else x
    return jnp.where(reverse, jnp.flip(x, axis), x)


def one_later(x_BxTxD: Array) -> Array:
    """What each position predicts, at the position that it is for; zeros at position 0."""
    return jnp.pad(x_BxTxD[:, :-1], ((0, 0), (1, 0), (0, 0)))


def check_labels(num_classes: int, labels, batch: int) -> None:
    """ValueError unless labels (None, traced or concrete) are [batch] and within [-1, classes)."""
    if labels is None:
        return
    if jnp.shape(labels) != (batch,):
        raise ValueError(f'labels have shape {jnp.shape(labels)}, {batch} images need ({batch},).')
    if num_classes == 0 or isinstance(labels, jax.core.Tracer):
        return
    if isinstance(labels, jax.Array) and not labels.is_fully_addressable:
        return
    values = np.asarray(labels)
    wrong = values[(values < -1) | (values >= num_classes)]
    if wrong.size:
        raise ValueError(
            f'label {wrong[0]} is outside 0..{num_classes - 1}, the classes of this flow '
            '(-1 stands for no class).'
        )


class Block(nn.Module):
    """One autoregressive flow block: a causal Transformer that predicts log-scale and shift.

    All sequences here are in the block's own order (raster, or reversed for odd blocks); only
    `position_embedding` is stored in raster order, hence the `reverse` arguments. They may be
    traced, so that one compiled program serves every block of the same depth.
    """

    num_patches: int
    patch_dim: int
    width: int
    num_layers: int
    num_classes: int = 0
    head_dim: int = 64
    volume_preserving: bool = False
    dtype: DTypeLike = jnp.float32
    remat: str = 'none'
    unroll: int = 1
    layout: Any = OneDevice()

    def setup(self):
        normal = nn.initializers.normal(0.01)
        self.proj_in = Linear(
            (self.patch_dim,), (self.width,), 'proj_in', self.dtype, self.layout
        )
        self.position_embedding = self.param(
            'position_embedding', normal, (self.num_patches, self.width)
        )
        if self.num_classes:
            self.class_embedding = self.param(
                'class_embedding', normal, (self.num_classes, self.width)
            )
        layer = Layer
        if self.remat != 'none':
            # prevent_cse is needed outside of a scan only, and costs speed inside one.
            layer = nn.remat(Layer, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        self.layers = nn.scan(
            layer,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=nn.broadcast,
            length=self.num_layers,
            unroll=min(self.unroll, self.num_layers),
        )(self.width, self.head_dim, self.dtype, self.layout)
        outputs = self.patch_dim if self.volume_preserving else 2 * self.patch_dim
        # Zero kernel: the flow starts near the identity. float32 outputs: they are log-scales.
        self.proj_out = Linear(
            (self.width,), (outputs,), 'proj_out', self.dtype, self.layout, zero_kernel=True,
            output_dtype=at_least_float32(self.dtype),
        )

    def __call__(
        self, x_BxTxD: Array, labels_B: Array | None = None, reverse=False, temperature=1.0
    ) -> tuple[Array, Array]:
        """Log-scale and shift of every position from those before it, both [B, T, D] float32.

        Position 0 has neither: both are zero there. The log-scale of a volume-preserving block is
        zero everywhere.
        """
        log_scale, shift = self.predictions(x_BxTxD, labels_B, reverse, temperature)
        return one_later(log_scale), one_later(shift)

    def predictions(
        self, x_BxTxD: Array, labels_B: Array | None = None, reverse=False, temperature=1.0
    ) -> tuple[Array, Array]:
        """As `__call__`, but at the positions that predict: those for t + 1 are at t."""
        positions = flip_if(reverse, self.position_embedding, 0)
        h, _ = self.layers(self.embed(x_BxTxD, positions, labels_B), temperature)
        return self.predict(h)

    def embed(self, x_BxSxD: Array, positions_SxC: Array, labels_B: Array | None) -> Array:
        """What enters the first layer at S positions, [B, S, C]; label -1 or None: the class mean.

        A sum: `network` computes the part of the labels once, for all positions.
        """
        h = self.proj_in(x_BxSxD) + positions_SxC.astype(self.dtype)
        if self.num_classes:
            mean = self.class_embedding.mean(0)
            if labels_B is None:
                h = h + mean.astype(self.dtype)
            else:
                # A label past the last class gives NaN (take's fill mode), never another class.
                known = jnp.take(self.class_embedding, jnp.maximum(labels_B, 0), axis=0)
                classes_BxC = jnp.where(labels_B[:, None] < 0, mean, known)
                h = h + classes_BxC[:, None].astype(self.dtype)
        return self.layout.place(h, 'tokens')

    def predict(self, h_BxSxC: Array) -> tuple[Array, Array]:
        """Log-scale and shift, [B, S, D] float32 each, that position s predicts for s + 1."""
        out = self.proj_out(h_BxSxC)
        if self.volume_preserving:
            return jnp.zeros_like(out), out
        log_scale, shift = jnp.split(out, 2, axis=-1)
        return log_scale, shift


class TarFlow(nn.Module):
    """The flow: x -> z with an exact log-determinant (paper section 3.1).

    Block b reads the patches in raster order if b is even, reversed if odd, and maps, with
    log-scale a and shift m predicted from the positions before t,

        forward  z_t = (x_t - m_t) * exp(-a_t)         all positions at once
        inverse  x_t = z_t * exp(a_t) + m_t            one position after another (`sample`)
        logdet   -sum over t, d of a                   per image, nats

    Variables: `params`, and for volume-preserving flows `prior/variance` [T, D], the variance of
    the Gaussian prior, which training moves by averaging instead of by gradient.

    Args:
      image_size: height and width in pixels.
      patch_size: height and width of a patch; divides image_size.
      width: channels of the Transformers; a multiple of head_dim.
      layers_per_block: one number of layers per block.
      num_classes: 0 for an unconditional flow, which ignores labels.
      volume_preserving: the paper's ablation without log-scales.
      dtype: of the Transformers' matrix products and activations. Parameters, normalisations,
        softmax, log-scales and log-determinants are float32 whatever it is.
      remat: what the backward pass recomputes: 'none', every 'layer', all but the 'dots', or all
        but the 'attention', whose outputs are small for what they cost.
      unroll: layers per iteration of the loop over layers; more compile longer, run faster on CPU.
      layout: where activations live and which attention kernel runs; `layers.OneDevice`, or a
        `training.sharding.Layout` for a mesh.

    Raises:
      ValueError: if the fields do not fit together.
    """

    image_size: int
    image_channels: int
    patch_size: int
    width: int
    layers_per_block: tuple[int, ...]
    num_classes: int = 0
    head_dim: int = 64
    volume_preserving: bool = False
    dtype: DTypeLike = jnp.float32
    remat: str = 'none'
    unroll: int = 1
    layout: Any = OneDevice()

    # A subclass may condition its blocks on other things.
    block_class: ClassVar[type[Block]] = Block

    def __post_init__(self):
        super().__post_init__()
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f'image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; '
                'choose a patch_size that divides it.'
            )
        if self.head_dim < 1 or self.width < 1 or self.width % self.head_dim:
            raise ValueError(
                f'width {self.width} is not a multiple of head_dim {self.head_dim}; '
                f'choose a width such as {max(1, self.width // self.head_dim) * self.head_dim}.'
            )
        if not self.layers_per_block or min(self.layers_per_block) < 1:
            raise ValueError(
                f'layers_per_block {tuple(self.layers_per_block)} must hold at least one block, '
                'each of at least one layer.'
            )
        if self.image_channels < 1 or self.num_classes < 0:
            raise ValueError(
                f'image_channels {self.image_channels} must be positive and num_classes '
                f'{self.num_classes} not negative (0 is unconditional).'
            )
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f'remat {self.remat!r} is none of {", ".join(REMAT_POLICIES)}.')

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * self.image_channels

    @property
    def num_dims(self) -> int:
        """T * D = H * W * C, the dimension of an image."""
        return self.num_patches * self.patch_dim

    @property
    def conditional(self) -> bool:
        """Whether labels change anything; a subclass may say so for blocks of its own."""
        return self.num_classes > 0

    def block_module(self, index: int) -> Block:
        """Block `index` by itself, unbound: `.apply({'params': params[f'block_{index}']}, ...)`.

        Blocks of the same depth are equal, so that programs compiled for one serve all.
        """
        return self.block_class(
            num_patches=self.num_patches,
            patch_dim=self.patch_dim,
            width=self.width,
            num_layers=self.layers_per_block[index],
            num_classes=self.num_classes,
            head_dim=self.head_dim,
            volume_preserving=self.volume_preserving,
            dtype=self.dtype,
            remat=self.remat,
            unroll=self.unroll,
            layout=self.layout,
            parent=None,
        )

    def setup(self):
        self.block = [self.block_module(b).clone() for b in range(len(self.layers_per_block))]
        if self.volume_preserving:
            self.variable('prior', 'variance', jnp.ones, (self.num_patches, self.patch_dim))

    def __call__(self, images: Array, labels: Array | None = None) -> tuple[Array, Array]:
        """Images to latents.

        Args:
          images: [B, H, W, C] in [-1, 1].
          labels: int32 [B], -1 for "no class", or None for no classes at all.
        Returns:
          z [B, T, D] float32 and logdet [B] float32, in nats, summed over all dimensions.
        """
        sequences, logdet = self.trajectory(images, labels)
        return sequences[-1], logdet

    def trajectory(self, images: Array, labels: Array | None = None) -> tuple[list[Array], Array]:
        """As `__call__`, with the output of every block, each [B, T, D] float32 in raster order."""
        expected = (self.image_size, self.image_size, self.image_channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f'images have shape {images.shape}, this flow takes [B, '
                f'{", ".join(map(str, expected))}].'
            )
        x = patchify(images, self.patch_size).astype(at_least_float32(images.dtype))
        x = self.layout.place(x, 'tokens')
        logdet = jnp.zeros(x.shape[0], x.dtype)
        sequences = []
        for b, block in enumerate(self.block):
            reverse = b % 2 == 1
            x = flip_if(reverse, x, 1)
            log_scale, shift = block(x, labels, reverse)
            x = flip_if(reverse, (x - shift) * jnp.exp(-log_scale), 1)
            logdet = logdet - log_scale.sum((1, 2))
            sequences.append(x)
        return sequences, logdet


_COMPUTE_FIELDS = ('dtype', 'remat', 'unroll', 'layout', 'parent', 'name')


def architecture(model: TarFlow) -> dict:
    """The fields of a flow that its parameters depend on, as JSON values."""
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    kept = {k: v for k, v in fields.items() if k not in _COMPUTE_FIELDS}
    return json.loads(json.dumps(kept))
