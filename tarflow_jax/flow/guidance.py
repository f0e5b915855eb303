"""Guidance: samples a sharper distribution by extrapolating away from a weaker prediction."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax.flow.affine import Affine
from tarflow_jax.flow.condition import both_branches, informative

Array = jax.Array

TARGETS = ('both', 'log_scale', 'shift')


def _linear(weight, conditional: Affine, unconditional: Affine) -> Affine:
    """Extrapolates log-scale and shift (TarFlow, section 3.4)."""
    (a_c, m_c, _), (a_u, m_u, _) = conditional, unconditional
    return Affine(a_c + weight * (a_c - a_u), m_c + weight * (m_c - m_u))


def _linear_sigma(weight, conditional: Affine, unconditional: Affine) -> Affine:
    """Extrapolates scale and shift (iTARFlow); the scale can become negative."""
    (a_c, m_c, _), (a_u, m_u, _) = conditional, unconditional
    # (sigma_c + w (sigma_c - sigma_u)) / sigma_c
    ratio = 1 - weight * jnp.expm1(a_u - a_c)
    return Affine(
        a_c + jnp.log(abs(ratio)), m_c + weight * (m_c - m_u), jnp.where(ratio < 0, -1.0, 1.0)
    )


def _starflow(weight, conditional: Affine, unconditional: Affine) -> Affine:
    """Returns the Gaussian N(c)^(1+w) / N(u)^w, never wider than c (STARFlow, arXiv 2506.06276).

    The minimum keeps its precision positive.
    """
    (a_c, m_c, _), (a_u, m_u, _) = conditional, unconditional
    s = jnp.exp(2 * jnp.minimum(a_c - a_u, 0.0))
    d = 1 + weight - weight * s
    return Affine(a_c - 0.5 * jnp.log(d), ((1 + weight) * m_c - weight * s * m_u) / d)


# To add a rule, write a function of (weight, conditional, unconditional) and add a line here.
RULES = {'linear': _linear, 'linear_sigma': _linear_sigma, 'starflow': _starflow}


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Settings for guiding the inverse of each block (TarFlow, section 3.4).

    Guidance moves the conditional prediction away from that of a second, weaker branch. The second
    branch drops classes and features, and divides its attention logits by `temperature`.

    Args:
      weight: guidance weight; the paper uses 0.2 to 3.4. With 0 there is no second branch.
      target: what to guide: 'both' outputs, only the 'log_scale' or only the 'shift'.
      temperature: attention temperature of the second branch.
      annealed: whether the weight grows linearly along the sequence, to `weight` at the last token.
      rule: 'linear' extrapolates log-scale and shift (TarFlow), 'linear_sigma' extrapolates scale
        and shift (iTARFlow), and 'starflow' never increases the scale.
      blocks: number of blocks to guide, counted from the one inverted first; None guides all.

    Raises:
      ValueError: if a field is out of range.
    """

    weight: float = 0.0
    target: str = 'both'
    temperature: float = 1.0
    annealed: bool = False
    rule: str = 'linear'
    blocks: int | None = None

    def __post_init__(self):
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f'weight {self.weight} must be a finite number, 0 or more.')
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f'temperature {self.temperature} must be above 0.')
        if self.target not in TARGETS:
            raise ValueError(f'target {self.target!r} must be one of {", ".join(TARGETS)}.')
        if self.rule not in RULES:
            raise ValueError(f'rule {self.rule!r} must be one of {", ".join(RULES)}.')
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(
                f'blocks {self.blocks} must be at least 1; None guides all blocks, weight=0 none.'
            )

    def check(self, flow, condition) -> None:
        """Raises ValueError if both branches would be equal, so that guidance would do nothing."""
        if self.weight > 0 and self.temperature == 1 and not informative(flow, condition):
            raise ValueError(
                f'weight {self.weight} has no effect without class labels, features or a '
                'temperature other than 1: both branches would be equal; set the guidance '
                'temperature (such as 0.3), or weight=0.'
            )

    def weights(self, length: int) -> Array:
        """Returns the weight at each token, in the block's own order: [T] float32."""
        ramp = jnp.arange(length) / max(length - 1, 1)
        return self.weight * (ramp if self.annealed else jnp.ones(length))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('weights', 'temperature'), meta_fields=('rule',),
)
@dataclasses.dataclass(frozen=True)
class GuidanceParams:
    """Guidance as a pytree; one compiled program serves all weights and temperatures.

    Args:
      rule: (target, rule), or None for no guidance.
      weights: [T + 1] float32, one per token; the last entry is unused.
      temperature: attention temperature of the second branch.
    """

    rule: tuple[str, str] | None = None
    weights: Array | None = None
    temperature: Any = None

    @classmethod
    def of(
        cls, guidance: Guidance | None, length: int, place_in_sampling: int = 0
    ) -> 'GuidanceParams':
        """Returns the parameters of one block; the block inverted first has place 0."""
        if guidance is None or guidance.weight == 0:
            return cls()
        if guidance.blocks is not None and place_in_sampling >= guidance.blocks:
            return cls()
        rule = (guidance.target, guidance.rule)
        return cls(rule, jnp.pad(guidance.weights(length), (0, 1)), guidance.temperature)

    @property
    def branches(self) -> int:
        return 1 if self.rule is None else 2

    def branch(self, condition, batch: int) -> tuple[Any, Any]:
        """Returns the condition and the attention temperature (1 or [N, 1, 1, 1]) of all rows.

        Both branches run as one batch. Each example's conditional and unconditional rows are
        adjacent, so that they are on the same device.
        """
        if self.rule is None:
            return condition, 1.0
        conditional = jnp.arange(2 * batch)[:, None, None, None] % 2 == 0
        return (
            both_branches(condition, batch), jnp.where(conditional, 1.0, self.temperature)
        )

    def combine(self, rows: Affine, first) -> Affine:
        """Combines the conditional and unconditional predictions.

        Args:
          rows: [D, N, S] each.
          first: index of the first predicted token; may be traced.
        Returns:
          [D, B, S] each.
        """
        if self.rule is None:
            return rows
        assert self.weights is not None

        def split(x):
            D, N, S = x.shape
            pairs = x.reshape(D, N // 2, 2, S)
            return pairs[:, :, 0], pairs[:, :, 1]

        (a_c, a_u), (m_c, m_u) = split(rows.log_scale), split(rows.shift)
        S = rows.shift.shape[2]
        weight = jax.lax.dynamic_slice_in_dim(self.weights, first, S)
        target, rule = self.rule
        conditional = Affine(a_c, m_c)
        guided = RULES[rule](weight, conditional, Affine(a_u, m_u))
        if target == 'log_scale':
            return guided._replace(shift=m_c)
        return conditional._replace(shift=guided.shift) if target == 'shift' else guided
