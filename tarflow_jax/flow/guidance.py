"""Guidance: sampling from a sharper distribution by extrapolating away from a weaker prediction."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from tarflow_jax.flow.attention import Array

TARGETS = ('both', 'log_scale', 'shift')
RULES = ('linear', 'starflow')


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How the inverse of each block is guided (paper section 3.4).

    The conditional prediction is moved away from that of a second, weaker branch: the class mean
    for flows with classes, and, where `temperature` is not 1, with attention logits divided by it.

    Args:
      weight: 0 is no guidance (and no second branch); the paper uses 0.2 to 3.4.
      target: guide 'both' outputs, only the 'log_scale' or only the 'shift'.
      temperature: of the attention in the second branch.
      annealed: the weight grows linearly along the sequence, from weight / (T - 1) to weight.
      rule: 'linear' extrapolation of log-scale and shift, or the 'starflow' rule
        (arXiv 2506.06276) on scales, which cannot blow them up.

    Raises:
      ValueError: for a value outside these.
    """

    weight: float = 0.0
    target: str = 'both'
    temperature: float = 1.0
    annealed: bool = False
    rule: str = 'linear'

    def __post_init__(self):
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f'guidance weight {self.weight} must be a number from 0 up.')
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f'guidance temperature {self.temperature} must be above 0.')
        if self.target not in TARGETS:
            raise ValueError(f'guidance target {self.target!r} is none of {", ".join(TARGETS)}.')
        if self.rule not in RULES:
            raise ValueError(f'guidance rule {self.rule!r} is none of {", ".join(RULES)}.')

    def check(self, has_labels: bool) -> None:
        """ValueError if the second branch would equal the first and the guidance do nothing."""
        if self.weight > 0 and not has_labels and self.temperature == 1:
            raise ValueError(
                f'guidance weight {self.weight} needs class labels or a temperature other than 1: '
                'without either both branches are the same; set guidance.temperature (such as '
                '0.3) or guidance.weight=0.'
            )

    def weights(self, num_patches: int) -> Array:
        """Weight at each generated position 1..T-1 in the block's own order: [T - 1] float32."""
        ramp = jnp.arange(1, num_patches) / max(num_patches - 1, 1)
        return self.weight * (ramp if self.annealed else jnp.ones(num_patches - 1))


def guide(target: str, rule: str, weight, conditional, unconditional) -> tuple[Array, Array]:
    """Guided (log_scale, shift) from those of the two branches; `weight` broadcasts to them."""
    a_c, m_c = conditional
    a_u, m_u = unconditional
    if rule == 'linear':
        a, m = a_c + weight * (a_c - a_u), m_c + weight * (m_c - m_u)
    else:
        # A Gaussian N(m, sigma^2) = N(c)^(1+w) / N(u)^w; the minimum keeps its precision positive.
        s = jnp.exp(2 * jnp.minimum(a_c - a_u, 0.0))
        d = 1 + weight - weight * s
        a, m = a_c - 0.5 * jnp.log(d), ((1 + weight) * m_c - weight * s * m_u) / d
    return (a if target != 'shift' else a_c), (m if target != 'log_scale' else m_c)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('weights', 'temperature'), meta_fields=('rule',),
)
@dataclasses.dataclass(frozen=True)
class Steering:
    """Guidance as compiled programs take it: weights and temperatures share a program.

    Args:
      rule: (target, rule), or None for unguided.
      weights: [T] float32, by the position that predicts; the last of them is of no use.
      temperature: of the attention in the second branch.
    """

    rule: tuple[str, str] | None = None
    weights: Array | None = None
    temperature: Array | float | None = None

    @classmethod
    def of(cls, guidance: Guidance | None, num_patches: int) -> 'Steering':
        if guidance is None or guidance.weight == 0:
            return cls()
        weights = jnp.pad(guidance.weights(num_patches), (0, 1))
        return cls((guidance.target, guidance.rule), weights, guidance.temperature)

    @property
    def branches(self) -> int:
        return 1 if self.rule is None else 2

    def branch(self, labels: Array | None, batch: int) -> tuple[Array | None, Array | float]:
        """Labels of all rows, and what divides their attention logits, broadcast to [N, 1, 1, 1].

        Both branches run as one batch, side by side so that they are on the same device: the
        conditional one of each image, then the unconditional.
        """
        if self.rule is None:
            return labels, 1.0
        assert self.temperature is not None
        given = jnp.full(batch, -1) if labels is None else labels
        labels = jnp.stack([given, jnp.full(batch, -1)], 1).reshape(2 * batch)
        conditional = jnp.arange(2 * batch)[:, None, None, None] % 2 == 0
        return labels, jnp.where(conditional, 1.0, self.temperature)

    def guide(self, log_scale: Array, shift: Array, start) -> tuple[Array, Array]:
        """What the images take, [D, B, S] each, of their rows' predictions [D, N, S].

        Args:
          start: the first of the positions that predict.
        """
        if self.rule is None:
            return log_scale, shift
        assert self.weights is not None
        D, N, S = log_scale.shape
        rows = [x.reshape(D, N // 2, 2, S) for x in (log_scale, shift)]
        conditional, unconditional = ([x[:, :, i] for x in rows] for i in (0, 1))
        weight = jax.lax.dynamic_slice_in_dim(self.weights, start, S)
        return guide(*self.rule, weight, conditional, unconditional)
