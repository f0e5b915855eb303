"""Guidance: sampling from a sharper distribution by extrapolating away from a weaker prediction."""

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
    """Extrapolates scale and shift (iTARFlow); the scale may come out negative."""
    (a_c, m_c, _), (a_u, m_u, _) = conditional, unconditional
    # sigma_c + w (sigma_c - sigma_u), as a multiple of sigma_c.
    ratio = 1 - weight * jnp.expm1(a_u - a_c)
    return Affine(
        a_c + jnp.log(abs(ratio)), m_c + weight * (m_c - m_u), jnp.where(ratio < 0, -1.0, 1.0)
    )


def _starflow(weight, conditional: Affine, unconditional: Affine) -> Affine:
    """The Gaussian N(c)^(1+w) / N(u)^w (STARFlow, arXiv 2506.06276), which is never wider than c.

    The minimum keeps its precision positive.
    """
    (a_c, m_c, _), (a_u, m_u, _) = conditional, unconditional
    s = jnp.exp(2 * jnp.minimum(a_c - a_u, 0.0))
    d = 1 + weight - weight * s
    return Affine(a_c - 0.5 * jnp.log(d), ((1 + weight) * m_c - weight * s * m_u) / d)


# A new rule is a function of (weight, conditional, unconditional), and a line here.
RULES = {'linear': _linear, 'linear_sigma': _linear_sigma, 'starflow': _starflow}


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How the inverse of each block is guided (TarFlow, section 3.4).

    The conditional prediction is moved away from that of a second, weaker branch: without classes
    and features, and, where `temperature` is not 1, with attention logits divided by it.

    Args:
      weight: 0 is no guidance (and no second branch); the paper uses 0.2 to 3.4.
      target: guide 'both' outputs, only the 'log_scale' or only the 'shift'.
      temperature: of the attention in the second branch.
      annealed: the weight grows linearly along the sequence, up to `weight` at its last token.
      rule: 'linear' extrapolation of log-scale and shift (TarFlow), 'linear_sigma' of scale and
        shift (iTARFlow), or the 'starflow' rule, which cannot blow up the scale.
      blocks: guide only so many blocks, those inverted first; None guides all.

    Raises:
      ValueError: for a value outside these.
    """

    weight: float = 0.0
    target: str = 'both'
    temperature: float = 1.0
    annealed: bool = False
    rule: str = 'linear'
    blocks: int | None = None

    def __post_init__(self):
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f'weight {self.weight} of the guidance must be a number from 0 up.')
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f'temperature {self.temperature} of the guidance must be above 0.')
        if self.target not in TARGETS:
            raise ValueError(
                f'target {self.target!r} of the guidance is none of {", ".join(TARGETS)}.'
            )
        if self.rule not in RULES:
            raise ValueError(f'rule {self.rule!r} of the guidance is none of {", ".join(RULES)}.')
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(
                f'blocks {self.blocks} of the guidance must be at least 1; None guides all blocks, '
                'weight=0 none.'
            )

    def check(self, flow, condition) -> None:
        """ValueError if the second branch would equal the first and the guidance do nothing."""
        if self.weight > 0 and self.temperature == 1 and not informative(flow, condition):
            raise ValueError(
                f'weight {self.weight} of the guidance needs class labels, features or a '
                'temperature other than 1: without them both branches are the same; set the '
                'temperature of the guidance (such as 0.3), or weight=0.'
            )

    def weights(self, length: int) -> Array:
        """The weight at each token of a sequence, in the block's own order: [T] float32."""
        ramp = jnp.arange(length) / max(length - 1, 1)
        return self.weight * (ramp if self.annealed else jnp.ones(length))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('weights', 'temperature'), meta_fields=('rule',),
)
@dataclasses.dataclass(frozen=True)
class GuidanceParams:
    """Guidance as compiled programs take it: all weights and temperatures share a program.

    Args:
      rule: (target, rule), or None for unguided.
      weights: [T + 1] float32, at each token of a sequence and, unused, past its last.
      temperature: of the attention in the second branch.
    """

    rule: tuple[str, str] | None = None
    weights: Array | None = None
    temperature: Any = None

    @classmethod
    def of(
        cls, guidance: Guidance | None, length: int, place_in_sampling: int = 0
    ) -> 'GuidanceParams':
        """For a block; the one inverted first has place 0."""
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
        """The condition of all rows, and what divides their attention logits, for [N, 1, 1, 1].

        Both branches run as one batch, side by side so that they are on the same device: the
        conditional one of each example, then the unconditional.
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
          first: the token that the first of the S predictions is for, a number; may be traced.
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
