"""One autoregressive block of a flow: a bijector whose map a causal Transformer predicts.

Shape suffixes: B examples, N = B or 2 B rows, T tokens, D numbers in a token, C width, F features.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tarflow_jax.flow import decoder
from tarflow_jax.flow.affine import Affine, affine_of
from tarflow_jax.flow.attention import Array, at_least_float32
from tarflow_jax.flow.condition import as_condition
from tarflow_jax.flow.guidance import GuidanceParams
from tarflow_jax.flow.order import reorder, restore, shift_right
from tarflow_jax.flow.parameters import Parameter, linear
from tarflow_jax.flow.transformer import (
    ChannelsFirst,
    ChannelsLast,
    OneDevice,
    gelu,
    layer,
    layer_parameters,
    product,
)

# What a layer keeps of its forward pass beside its input; the rest is recomputed.
REMAT_POLICIES = {
    'none': jax.checkpoint_policies.everything_saveable,
    'layer': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'attention': jax.checkpoint_policies.save_only_these_names('attention'),
}
FIRST_TOKENS = ('identity', 'start')
LONGEST_PERIOD = 10_000  # of the sines of the noise level


@dataclasses.dataclass(frozen=True)
class Block:
    """One autoregressive block (TarFlow, section 3.1), a bijector of sequences [B, T, D].

    With log-scale a and shift m predicted from the tokens before t, in the block's own order,

        forward  z_t = (x_t - m_t) * exp(-a_t)         all tokens at once
        inverse  x_t = z_t * exp(a_t) + m_t            one token after another
        logdet   -sum over t, d of a                   [B], nats

    The block knows no order (see `flow.order`): the functions take it, so that one compiled program
    serves all blocks with the same fields.

    The fields are those of `Flow`, with the sequence's `length` and `token_dim`, and `num_layers`.
    """

    length: int
    token_dim: int
    width: int
    num_layers: int
    head_dim: int = 64
    num_classes: int = 0
    num_features: int = 0
    noise_conditioned: bool = False
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

    def parameters(self) -> dict[str, Any]:
        """The arrays of the block, as a tree of `Parameter`."""
        T, D, C, F = self.length, self.token_dim, self.width, self.num_features
        tree: dict[str, Any] = {
            'proj_in': linear({'token': D}, {'width': C}),
            'position_embedding': Parameter((T, C), ('position', 'width'), 'normal', 0.01),
            'layers': jax.tree.map(
                lambda p: p.stacked(self.num_layers), layer_parameters(C, self.head_dim),
                is_leaf=lambda p: isinstance(p, Parameter),
            ),
            # Zero kernel: the flow starts near the identity.
            'proj_out': linear(
                {'width': C}, {'prediction': D if self.volume_preserving else 2 * D},
                zero_kernel=True,
            ),
        }
        if self.first_token == 'start':
            tree['start'] = Parameter((D,), ('token',), 'normal', 0.01)
        if self.num_classes:
            tree['class_embedding'] = Parameter(
                (self.num_classes, C), ('class', 'width'), 'normal', 0.01
            )
        if self.noise_conditioned:
            tree['noise_embedding'] = {
                'mlp_in': linear({'inputs': C}, {'hidden': 4 * C}, bias='width'),
                'mlp_out': linear({'hidden_inputs': 4 * C}, {'outputs': C}, bias='width'),
            }
        if F:
            tree['feature_embedding'] = linear({'feature': F}, {'width': C})
            tree['next_feature_embedding'] = linear({'feature': F}, {'width': C})
        return tree

    @property
    def stream_dtype(self) -> DTypeLike:
        """Of the residual stream, to which the layers add."""
        return jnp.promote_types(self.dtype, self.residual_dtype or self.dtype)

    @property
    def calls(self) -> int:
        """Network calls in a row of sequential decoding: one for each token that is predicted."""
        return self.length - (self.first_token == 'identity')

    def forward(self, params, x_BxTxD: Array, condition=None, order=False) -> tuple[Array, Array]:
        """Maps x to z.

        Args:
          params: of this block.
          x_BxTxD: in raster order, as is the result.
          condition: see `condition.as_condition`.
        Returns:
          z [B, T, D], and the log-determinant [B] in nats.
        """
        x = reorder(x_BxTxD, order)
        affine = self.affine(params, x, condition, order)
        z = restore(affine.forward(x), order)
        return z, -affine.log_scale.sum((1, 2))

    def inverse(
        self, params, z_BxTxD: Array, condition=None, order=False,
        guidance: GuidanceParams | None = None, *, cache_dtype=None,
    ) -> tuple[Array, Array]:
        """Maps z to x, one token after another; compiled once for all blocks with equal fields.

        Args:
          guidance: None is unguided.
          cache_dtype: of keys and values; None is the block's.
        Returns:
          x [B, T, D], and the inverse's log-determinant [B] in nats.
        """
        return decoder.invert(
            self, z_BxTxD, params, condition, order, guidance or GuidanceParams(),
            cache_dtype=cache_dtype,
        )

    def affine(
        self, params, x_BxTxD: Array, condition=None, order=False, temperature: Any = 1.0
    ) -> Affine:
        """The map of every token, [B, T, D] float32, predicted from those before it.

        Args:
          x_BxTxD: in the block's own order, as is the result.
          temperature: divides the attention logits; a number or [B, 1, 1, 1].
        """
        form = ChannelsLast(self.dtype, self.layout, self.precision)
        inputs = x_BxTxD
        if self.first_token == 'start':
            start = jnp.broadcast_to(params['start'].astype(x_BxTxD.dtype), x_BxTxD[:, :1].shape)
            inputs = jnp.concatenate([start, x_BxTxD[:, :-1]], axis=1)
        positions = reorder(params['position_embedding'], order, axis=0).astype(self.stream_dtype)
        context = self.context(params, condition, order)
        affine, _ = self.network(
            form, params, inputs, context + positions, temperature=temperature
        )
        return affine.map(shift_right) if self.first_token == 'identity' else affine

    def network(
        self, form: ChannelsLast | ChannelsFirst, params, x: Array, context: Array, *,
        caches=None, start=0, temperature: Any = 1.0,
    ) -> tuple[Affine, Any]:
        """The Transformer: what each position predicts for the next token.

        Args:
          form: of all arrays; see `transformer`. With channels last, `params` are the block's, and
            with channels first, what `decoder.prepare` makes of them.
          x: tokens at S positions, channels D; context: what is added to them, channels C.
          caches: of every layer, as for `transformer.layer`; None without.
        Returns:
          the map of the next tokens, float32, and the caches with these positions filled in.
        """
        h = form.linear(params['proj_in'], x, 'proj_in')
        h = form.constrain(h + context, 'width')
        one = functools.partial(
            layer, form, head_dim=self.head_dim, start=start, temperature=temperature
        )
        if caches is not None:
            filled = []
            for own, cache in zip(params['layers'], caches):
                h, cache = one(own, h, cache=cache)
                filled.append(cache)
            caches = filled
        else:
            def body(h, own):
                return one(own, h)

            if self.remat != 'none':
                # prevent_cse is needed outside of a scan only, and costs speed inside one.
                body = jax.checkpoint(
                    body, prevent_cse=False, policy=REMAT_POLICIES[self.remat]
                )
            h, _ = jax.lax.scan(
                body, h, params['layers'], unroll=min(self.unroll, self.num_layers)
            )
        outputs = form.linear(
            params['proj_out'], h, 'proj_out', at_least_float32(self.dtype)
        )
        affine = affine_of(
            outputs, form.axis, scale=self.scale, limit=self.scale_limit,
            volume_preserving=self.volume_preserving,
        )
        return affine, caches

    def context(self, params, condition, order=False) -> Array:
        """What the condition adds to the tokens: [B, T, C], with axes of 1 where all are alike.

        A sum of the class's embedding (the mean over all classes without one), the noise level's,
        and those of the features.
        """
        c = as_condition(condition)
        context = jnp.zeros((1, 1, self.width), self.stream_dtype)
        if self.num_classes:
            embedding = params['class_embedding']
            mean = embedding.mean(0)
            if c.labels is None:
                classes = mean[None, None]
            else:
                # A label past the last class gives NaN (take's fill mode), never another class.
                known = jnp.take(embedding, jnp.maximum(c.labels, 0), axis=0)
                classes = jnp.where(c.labels[:, None] < 0, mean, known)[:, None]
            context = context + classes.astype(self.stream_dtype)
        if self.noise_conditioned:
            level = jnp.atleast_1d(jnp.asarray(c.noise_std, at_least_float32(self.dtype)))
            noise = noise_embedding(params['noise_embedding'], level)
            context = context + noise[:, None].astype(self.stream_dtype)
        if self.num_features and c.features is not None:
            context = context + self._feature_context(params, c.features, order)
        return context

    def _feature_context(self, params, features: Array, order) -> Array:
        """Of each token's own features, and of those of the token that is predicted from it.

        The first token's features reach its prediction through the start token, if there is one.
        """
        present = jnp.isfinite(features).all(-1, keepdims=True)
        features = jnp.where(present, features, 0.0)

        def embed(name):
            kernel, bias = params[name]['kernel'], params[name]['bias']
            contract = (((features.ndim - 1,), (0,)), ((), ()))
            e = product(features.astype(kernel.dtype), kernel, contract) + bias
            return jnp.where(present, e, 0.0).astype(self.stream_dtype)

        own, upcoming = embed('feature_embedding'), embed('next_feature_embedding')
        if features.ndim == 2:  # the same for all tokens
            return (own + upcoming)[:, None]
        own, upcoming = reorder(own, order), reorder(upcoming, order)
        if self.first_token == 'start':
            return shift_right(own) + upcoming
        return own + jnp.pad(upcoming[:, 1:], ((0, 0), (0, 1), (0, 0)))


def noise_embedding(params, noise_std_B: Array) -> Array:
    """The embedding [B, C] of noise levels: an MLP of sines and cosines of log t (iTARFlow)."""
    x = noise_features(noise_std_B, params['mlp_in']['kernel'].shape[0])
    matrices = (((1,), (0,)), ((), ()))
    for name, activation in (('mlp_in', gelu), ('mlp_out', lambda x: x)):
        x = activation(product(x, params[name]['kernel'], matrices) + params[name]['bias'])
    return x


def noise_features(noise_std_B: Array, width: int) -> Array:
    """[sin(log t * f), cos(log t * f)], f = 10000^(-k / h), k = 0..h-1, h = width / 2: [B, 2 h]."""
    half = width // 2
    frequencies = jnp.exp(-math.log(LONGEST_PERIOD) * jnp.arange(half) / half)
    angles = jnp.log(noise_std_B)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
