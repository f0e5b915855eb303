"""The flows: `SequenceFlow` over sequences of tokens, `TarFlow` over images cut into patches.

Zhai et al., "Normalizing Flows are Capable Generative Models", ICML 2025 (arXiv 2412.06329).

Shape suffixes: B examples, T tokens, D numbers in a token, C width.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from tarflow_jax.flow import order as orderings
from tarflow_jax.flow.affine import SCALES
from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.block import FIRST_TOKENS, REMAT_POLICIES, Block
from tarflow_jax.flow.condition import at_noise_level, check_condition, labels_keyword
from tarflow_jax.flow.mesh_axes import with_auto_axes
from tarflow_jax.flow.parameters import abstract, initialize
from tarflow_jax.flow.patches import pair, patchify, unpatchify
from tarflow_jax.flow.products import PRECISIONS, at_least_float32
from tarflow_jax.flow.transformer import OneDevice

Variables = Mapping[str, Any]  # what `init` returns

FAR_OUTSIDE = 50.0  # samples of an untrained flow may reach 10; pixels 0 to 255 reach 255


class Flow(nn.Module, kw_only=True):
    """The base class of `SequenceFlow` and `TarFlow`: x -> z with an exact log-determinant.

    A flow is a stack of `Block`s; block 0 is nearest the data. Its variables are `params/block_B`
    and, if it is volume-preserving, `prior/variance` [T, D]. Training updates this variance of the
    Gaussian prior by a moving average, not by gradient.

    Args:
      width: number of channels of the Transformers; a multiple of head_dim.
      layers_per_block: number of layers of each block.
      head_dim: number of channels of an attention head.
      num_classes: number of classes. With 0, the flow ignores labels.
      num_features: length of a feature vector. With 0, the flow takes no features.
      noise_conditioned: whether the flow is conditioned on the noise level of its data (iTARFlow,
        arXiv 2604.20041).
      orders: the order in which each block reads the tokens: 'alternate' (raster, reversed,
        raster, ...), or one permutation of range(T) per block.
      scale: 'exp' for sigma = exp(a), or 'softplus' for sigma = log(1 + exp(a + 0.541325)).
      scale_limit: bounds the raw log-scales and shifts by c tanh(. / c), which keeps scales from
        exploding. None sets no bound.
      first_token: 'identity' passes the first token of a block through (TarFlow); 'start' predicts
        it too, from a learned start token.
      volume_preserving: whether to leave out the log-scales (an ablation of the TarFlow paper).
      dtype: dtype of the Transformers' matrix products and activations. Parameters,
        normalizations, softmax, log-scales and log-determinants are always float32.
      residual_dtype: dtype of the residual stream, if wider than `dtype`. The official code's
        autocast to bfloat16 keeps it in float32.
      precision: number of bfloat16 passes in a float32 matrix product on TPU: six ('highest'),
        three ('high') or one ('default'); see docs/performance.md. No effect on a CPU.
      remat: what the backward pass recomputes: nothing ('none'), every layer ('layer'), everything
        except matrix products ('dots'), or everything except attention outputs ('attention'),
        which are small and expensive to recompute.
      unroll: layers per iteration of the loop over layers. Larger values compile more slowly and
        run faster on CPU.
      layout: decides how activations are sharded and which attention kernel runs:
        `transformer.OneDevice`, or a `training.sharding.Layout` for a mesh.

    Raises:
      ValueError: if the fields do not fit together.
    """

    if TYPE_CHECKING:  # subclasses declare these after their own fields
        width: int
        layers_per_block: tuple[int, ...]
    head_dim: int = 64
    num_classes: int = 0
    num_features: int = 0
    noise_conditioned: bool = False
    orders: Any = 'alternate'
    scale: str = 'exp'
    scale_limit: float | None = None
    first_token: str = 'identity'
    volume_preserving: bool = False
    dtype: DTypeLike = jnp.float32
    residual_dtype: DTypeLike | None = None
    precision: str = 'highest'
    remat: str = 'none'
    unroll: int = 1
    layout: Any = OneDevice()

    def __post_init__(self):
        if not isinstance(self.orders, str):  # jit's static arguments must be hashable
            rows = tuple(tuple(np.asarray(order).tolist()) for order in self.orders)
            object.__setattr__(self, 'orders', rows)
        super().__post_init__()
        for field, choices in (
            ('remat', REMAT_POLICIES), ('scale', SCALES), ('first_token', FIRST_TOKENS),
            ('precision', PRECISIONS),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f'{field} {getattr(self, field)!r} must be one of {", ".join(choices)}.'
                )
        if self.head_dim < 1 or self.width < 1 or self.width % self.head_dim:
            heads = max(1, self.width // max(self.head_dim, 1))
            raise ValueError(
                f'width {self.width} is not a multiple of head_dim {self.head_dim}; choose a '
                f'positive head_dim and a width such as {heads * max(self.head_dim, 1)}.'
            )
        if self.noise_conditioned and self.width % 2:
            raise ValueError(
                f'width {self.width} of a noise-conditioned flow must be even: half of the '
                'noise embedding is sines, half cosines.'
            )
        if not self.layers_per_block or min(self.layers_per_block) < 1:
            raise ValueError(
                f'layers_per_block {tuple(self.layers_per_block)} must have at least one block, '
                'and each block at least one layer.'
            )
        for field in ('num_classes', 'num_features'):
            if getattr(self, field) < 0:
                raise ValueError(
                    f'{field} {getattr(self, field)} must not be negative; use 0 for none.'
                )
        if self.scale_limit is not None and not 0 < self.scale_limit < float('inf'):
            raise ValueError(
                f'scale_limit {self.scale_limit} must be a finite number above 0, or None for no '
                'limit.'
            )
        T, D = self.token_shape
        if T < 1 or D < 1:
            raise ValueError(
                f'length {T} and token_dim {D} of the sequence must both be at least 1.'
            )
        if T == 1 and self.first_token == 'identity':
            raise ValueError(
                "a sequence of 1 token passes through unchanged with first_token 'identity', so "
                "the flow cannot learn; choose first_token='start', or smaller patches for images."
            )
        self.block_orders()

    @property
    def token_shape(self) -> tuple[int, int]:
        """(T, D): tokens per sequence and numbers per token."""
        raise NotImplementedError

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of one example (a sequence or an image)."""
        raise NotImplementedError

    def to_tokens(self, examples: Array) -> Array:
        """Converts examples [B, ...] to sequences [B, T, D]."""
        raise NotImplementedError

    def from_tokens(self, x_BxTxD: Array) -> Array:
        """Converts sequences [B, T, D] to examples [B, ...]; the inverse of `to_tokens`."""
        raise NotImplementedError

    @property
    def num_dims(self) -> int:
        """T * D, the dimension of an example."""
        return self.token_shape[0] * self.token_shape[1]

    @property
    def conditional(self) -> bool:
        """Whether the flow has classes or features, which guidance can drop."""
        return self.num_classes > 0 or self.num_features > 0

    def block(self, index: int) -> Block:
        """Returns block `index`, a bijector that takes `params['block_{index}']` explicitly.

        Blocks with the same number of layers compare equal, so they share compiled programs.
        """
        (T, D), own = self.token_shape, {f.name for f in dataclasses.fields(self)}
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(Block) if f.name in own}
        sequence = {'length': T, 'token_dim': D, 'num_layers': self.layers_per_block[index]}
        return Block(**shared | sequence)

    def block_orders(self) -> tuple[Any, ...]:
        """Returns the order of each block, for `Block.forward` and `Block.inverse`."""
        return orderings.orders_of(self.orders, len(self.layers_per_block), self.token_shape[0])

    def parameters(self) -> dict[str, Any]:
        """Describes the flow's arrays as `parameters.Parameter`s, in the tree of `params`."""
        return {
            f'block_{b}': self.block(b).parameters() for b in range(len(self.layers_per_block))
        }

    def setup(self):
        trees = self.parameters()
        if self.is_initializing():
            # Initialize block by block: equal blocks then compile once.
            key = self.make_rng('params')
            initial = {
                name: initialize(jax.random.fold_in(key, b), tree)
                for b, (name, tree) in enumerate(trees.items())
            }
        else:  # flax reads only the shapes
            initial = jax.tree.map(
                lambda x: np.broadcast_to(np.float32(0), x.shape), abstract(trees)
            )
        self.block_params = [
            self.param(name, lambda _, tree=tree: tree) for name, tree in initial.items()
        ]
        if self.volume_preserving:
            self.variable('prior', 'variance', jnp.ones, self.token_shape)

    @labels_keyword
    def __call__(self, examples: Array, condition=None) -> tuple[Array, Array]:
        """Maps examples to latents.

        Args:
          examples: [B, T, D] of a `SequenceFlow`; [B, H, W, C] in [-1, 1] of a `TarFlow`.
          condition: None, labels int32 [B] (-1 for "no class"), or a `Condition`.
        Returns:
          z [B, T, D] float32 and logdet [B] float32, in nats, summed over all dimensions.
        Raises:
          ValueError: if shapes, types or (outside jit) the condition's values are wrong.
        """
        sequences, logdet = self.trajectory(examples, condition)
        return sequences[-1], logdet

    @labels_keyword
    def trajectory(self, examples: Array, condition=None) -> tuple[list[Array], Array]:
        """Like `__call__`, but returns every block's output [B, T, D], float32 in raster order."""
        self.check_examples(examples)
        if self.is_initializing() and self.noise_conditioned:  # `init` works without a condition
            condition = at_noise_level(condition, 1.0)
        condition = check_condition(self, condition, examples.shape[0])
        return with_auto_axes(self._trajectory, examples, self.block_params, condition)

    def _trajectory(self, examples, block_params, condition) -> tuple[list[Array], Array]:
        x = self.to_tokens(examples).astype(at_least_float32(examples.dtype))
        x = self.layout.constrain(x, 'batch', 'length', 'token')
        logdet = jnp.zeros(x.shape[0], x.dtype)
        sequences = []
        for b, order in enumerate(self.block_orders()):
            static = bool(order) if order.dtype == bool else order
            x, own_logdet = self.block(b).forward(block_params[b], x, condition, static)
            logdet = logdet + own_logdet
            sequences.append(x)
        return sequences, logdet

    def check_examples(self, examples) -> None:
        """Raises ValueError unless examples, traced or not, are floats of the flow's shape."""
        shape, dtype = jnp.shape(examples), jnp.result_type(examples)
        if len(shape) != 1 + len(self.example_shape) or shape[1:] != self.example_shape:
            raise ValueError(
                f'the examples have shape {shape}; this flow takes [B, '
                f'{", ".join(map(str, self.example_shape))}].'
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f'the examples are {dtype}; {self._float_remedy}')

    _float_remedy = 'pass float32.'


class SequenceFlow(Flow):
    """A flow over sequences [B, T, D] of any kind.

    Args:
      length: T, the number of tokens in a sequence.
      token_dim: D, the numbers in a token.

    `Flow` describes the other fields.
    """

    length: int
    token_dim: int
    width: int
    layers_per_block: tuple[int, ...]

    @property
    def token_shape(self) -> tuple[int, int]:
        return self.length, self.token_dim

    @property
    def example_shape(self) -> tuple[int, ...]:
        return self.token_shape

    def to_tokens(self, examples: Array) -> Array:
        return examples

    def from_tokens(self, x_BxTxD: Array) -> Array:
        return x_BxTxD


class TarFlow(Flow):
    """A flow over images [B, H, W, C] in [-1, 1], read as sequences of patches in raster order.

    Args:
      image_size: image size in pixels: one number, or (height, width).
      image_channels: C, the number of channels.
      patch_size: patch size in pixels: one number, or (height, width); must divide image_size.

    `Flow` describes the other fields.
    """

    image_size: int | tuple[int, int]
    image_channels: int
    patch_size: int | tuple[int, int]
    width: int
    layers_per_block: tuple[int, ...]

    _float_remedy = 'scale them to float32 in [-1, 1], such as images / 127.5 - 1.'

    def __post_init__(self):
        for field in ('image_size', 'patch_size'):
            value = getattr(self, field)
            if not isinstance(value, int):
                pair = tuple(value)
                if len(pair) != 2 or not all(isinstance(x, int) for x in pair):
                    raise ValueError(f'{field} {value} must be one number or (height, width).')
                object.__setattr__(self, field, pair[0] if pair[0] == pair[1] else pair)
        sides = (*self.image_shape[:2], *self.patch_shape)
        if min(sides) < 1 or sides[0] % sides[2] or sides[1] % sides[3]:
            raise ValueError(
                f'image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; '
                'choose a patch_size that divides it.'
            )
        if self.image_channels < 1:
            raise ValueError(f'image_channels {self.image_channels} must be positive.')
        super().__post_init__()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (*pair(self.image_size), self.image_channels)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return pair(self.patch_size)

    @property
    def num_patches(self) -> int:
        """T."""
        (H, W, _), (h, w) = self.image_shape, self.patch_shape
        return (H // h) * (W // w)

    @property
    def patch_dim(self) -> int:
        """D."""
        h, w = self.patch_shape
        return h * w * self.image_channels

    @property
    def token_shape(self) -> tuple[int, int]:
        return self.num_patches, self.patch_dim

    @property
    def example_shape(self) -> tuple[int, ...]:
        return self.image_shape

    def to_tokens(self, examples: Array) -> Array:
        return patchify(examples, self.patch_size)

    def from_tokens(self, x_BxTxD: Array) -> Array:
        return unpatchify(x_BxTxD, self.patch_size, self.image_size)

    def check_examples(self, examples) -> None:
        super().check_examples(examples)
        if isinstance(examples, jax.core.Tracer) or not np.size(examples):
            return
        if isinstance(examples, jax.Array) and not examples.is_fully_addressable:
            return
        largest = np.nanmax(abs(np.asarray(examples)), initial=0.0)
        if largest > FAR_OUTSIDE:
            warnings.warn(
                f'images reach {largest:g}, far outside [-1, 1]; scale them first: '
                'images / 127.5 - 1 for pixels 0 to 255.', stacklevel=3,
            )


_COMPUTE_FIELDS = (
    'dtype', 'residual_dtype', 'precision', 'remat', 'unroll', 'layout', 'parent', 'name'
)


def architecture(model: Flow) -> dict[str, Any]:
    """Returns the fields that determine a flow's parameters and function, as JSON values."""
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    kept = {k: v for k, v in fields.items() if k not in _COMPUTE_FIELDS}
    return json.loads(json.dumps(kept))


def field_defaults(model: Flow) -> dict[str, Any]:
    """Returns the default of each field of `architecture` that has one."""
    return {
        f.name: f.default for f in dataclasses.fields(model)
        if f.default is not dataclasses.MISSING and f.name not in _COMPUTE_FIELDS
    }
