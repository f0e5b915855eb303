"""One autoregressive block: a bijector whose affine map a causal Transformer predicts.

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
from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.condition import as_condition
from tarflow_jax.flow.guidance import GuidanceParams
from tarflow_jax.flow.order import reorder, restore, shift_right
from tarflow_jax.flow.parameters import Parameter, linear
from tarflow_jax.flow.products import at_least_float32, product
from tarflow_jax.flow.transformer import (
    ChannelsFirst,
    ChannelsLast,
    OneDevice,
    gelu,
    layer,
    layer_parameters,
)

# What a layer saves in its forward pass besides its input; the backward pass recomputes the rest.
REMAT_POLICIES = {
    'none': jax.checkpoint_policies.everything_saveable,
    'layer': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.save_only_these_names('dots'),
    'attention': jax.checkpoint_policies.save_only_these_names('attention'),
}
FIRST_TOKENS = ('identity', 'start')
LONGEST_PERIOD = 10_000  # of the sines in the noise embedding


@dataclasses.dataclass(frozen=True)
class Block:
    """One autoregressive block (TarFlow, section 3.1), a bijector of sequences [B, T, D].

    With log-scale a and shift m predicted from the tokens before t, in the block's own order,

        forward  z_t = (x_t - m_t) * exp(-a_t)         all tokens at once
        inverse  x_t = z_t * exp(a_t) + m_t            one token after another
        logdet   -sum over t, d of a                   [B], nats

    The methods take the order (see `flow.order`) as an argument, so that one compiled program
    serves all blocks with the same fields.

    The fields are those of `Flow`, plus the sequence's `length` and `token_dim`, and `num_layers`.
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
        """Describes the block's arrays as a tree of `Parameter`."""
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
        """The dtype of the residual stream."""
        return jnp.promote_types(self.dtype, self.residual_dtype or self.dtype)

    @property
    def calls(self) -> int:
        """The number of network calls in sequential decoding: one per predicted token."""
        return self.length - (self.first_token == 'identity')

    def forward(self, params, x_BxTxD: Array, condition=None, order=False) -> tuple[Array, Array]:
        """Maps x to z.

        Args:
          params: the parameters of this block.
          x_BxTxD: tokens in raster order; z is in raster order too.
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
        """Maps z to x, one token at a time. Blocks with equal fields share one compiled program.

        Args:
          guidance: None for no guidance.
          cache_dtype: dtype of the key/value cache; None for the block's dtype.
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
        """Predicts the affine map of every token from the tokens before it, [B, T, D] float32.

        Args:
          x_BxTxD: tokens in the block's own order; the result is in that order too.
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
        """Applies the Transformer: each position predicts the affine map of the next token.

        Args:
          form: layout of all arrays; see `transformer`. With channels last, `params` are the
            block's parameters; with channels first, the result of `decoder.prepare`.
          x: tokens at S positions, with D channels.
          context: added to the projected tokens, with C channels.
          caches: key/value cache of each layer, see `transformer.layer`; None for no cache.
        Returns:
          the affine map of the next tokens, float32, and the updated caches.
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
                # Only code outside a scan needs prevent_cse, and it slows down a scan.
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
        """Embeds the condition as [B, T, C], with size 1 along axes where all entries are equal.

        The result is the sum of the embeddings of the class, the noise level and the features.
        Without a class, the mean over all class embeddings is used.
        """
        c = as_condition(condition)
        context = jnp.zeros((1, 1, self.width), self.stream_dtype)
        if self.num_classes:
            embedding = params['class_embedding']
            mean = embedding.mean(0)
            if c.labels is None:
                classes = mean[None, None]
            else:
                # A label past the last class gives NaN (jnp.take's fill mode), not another class.
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
        """Embeds the features of each token and of the next token, which it predicts.

        With a start token, the first token's features reach its prediction through it.
        """
        present = jnp.isfinite(features).all(-1, keepdims=True)
        features = jnp.where(present, features, 0.0)

        def embed(name):
            kernel, bias = params[name]['kernel'], params[name]['bias']
            subscripts = 'nf,fc->nc' if features.ndim == 2 else 'ntf,fc->ntc'
            e = product(subscripts, features.astype(kernel.dtype), kernel) + bias
            return jnp.where(present, e, 0.0).astype(self.stream_dtype)

        own, upcoming = embed('feature_embedding'), embed('next_feature_embedding')
        if features.ndim == 2:  # the same for all tokens
            return (own + upcoming)[:, None]
        own, upcoming = reorder(own, order), reorder(upcoming, order)
        if self.first_token == 'start':
            return shift_right(own) + upcoming
        return own + jnp.pad(upcoming[:, 1:], ((0, 0), (0, 1), (0, 0)))


def noise_embedding(params, noise_std_B: Array) -> Array:
    """Embeds noise levels as [B, C]: an MLP of sines and cosines of log t (iTARFlow)."""
    x = noise_features(noise_std_B, params['mlp_in']['kernel'].shape[0])
    for name, activation in (('mlp_in', gelu), ('mlp_out', lambda x: x)):
        x = activation(product('ij,jk->ik', x, params[name]['kernel']) + params[name]['bias'])
    return x


def noise_features(noise_std_B: Array, width: int) -> Array:
    """Returns [sin(log t f), cos(log t f)], f = 10000^(-k/h), k = 0..h-1, h = width/2; [B, 2h]."""
    half = width // 2
    frequencies = jnp.exp(-math.log(LONGEST_PERIOD) * jnp.arange(half) / half)
    angles = jnp.log(noise_std_B)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
