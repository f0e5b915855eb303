"""Classification by the flow's likelihood: argmax over y of log p(x | y) (Bayes' rule)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.evaluation.bits_per_dim import standard_error
from tarflow_jax.flow import likelihood
from tarflow_jax.flow.flow import TarFlow
from tarflow_jax.training.corruption import Recipe, condition_of, corrupt_each
from tarflow_jax.training.over_set import over_set

SHOWN_CLASSES = 3
MOST_CONFUSED = 100  # the largest number of classes for which the confusion matrix is kept
BINS = 15  # bins of the calibration error, as in Guo et al., arXiv 1706.04599


@functools.partial(jax.jit, static_argnums=(0, 1))
def class_log_probs(model: TarFlow, recipe: Recipe, variables, batch, keys):
    """Computes log p(x | y) for every class y and every image: [B, num_classes], in nats.

    The images get the noise of the training recipe, with keys [B]. All classes use the same noise.
    """
    images, noise_std, _ = corrupt_each(keys, batch['image'], recipe)

    def given(label):
        labels = jnp.full(images.shape[0], label)
        condition = condition_of(model, batch | {'label': labels}, noise_std)
        return likelihood.log_prob(model, variables, images, condition)

    return jax.lax.map(given, jnp.arange(model.num_classes)).T


def classification(
    model: TarFlow, variables, source, *, recipe: Recipe, mesh, batch_size, key, draws=1,
    name: Callable[[int], str] = str,
) -> dict:
    """Measures accuracy and calibration of the Bayes classifier with equal priors, in float32.

    log p(x | y) is averaged over the draws. It differs by hundreds of nats between classes, so the
    posterior is almost always near 0 or 1. So the calibration error is also measured after
    temperature scaling: the temperature is fitted on even-numbered images and tested on odd ones
    (Guo et al., arXiv 1706.04599, section 4.2). Images with label -1 are left out.

    Args:
      name: function from a label to the class name.
    Returns:
      the result of `calibration`, and 'images', 'draws', 'class_accuracy' by class name and, for up
      to 100 classes, 'confusion': {'classes': K names, 'counts': see `confusion`}.
    Raises:
      ValueError: if no image has a label.
    """
    model = model.clone(dtype=jnp.float32)

    def score(batch, keys):
        log_probs = class_log_probs(model, recipe, variables, batch, keys)
        return {'log_probs': log_probs, 'label': batch['label']}

    found = over_set(
        score, source, mesh=mesh, batch_size=batch_size, key=key, draws=draws, what='classification'
    )
    labels = found['label'][0]
    if not (labels >= 0).any():
        raise ValueError('classification needs labels, but no image of the dataset has one.')
    log_probs = found['log_probs'].astype(np.float64).mean(0)
    known = labels >= 0
    log_probs, labels = log_probs[known], labels[known]
    right = log_probs.argmax(1) == labels
    found = calibration(log_probs, labels) | {
        'images': len(labels), 'draws': draws,
        'class_accuracy': {name(k): right[labels == k].mean() for k in np.unique(labels)},
    }
    classes = log_probs.shape[1]
    if classes <= MOST_CONFUSED:
        found['confusion'] = {
            'classes': [name(k) for k in range(classes)],
            'counts': confusion(log_probs, labels).tolist(),
        }
    return found


def confusion(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts the images of each class (row) by the class they are taken for (column).

    Args:
      log_probs: [N, K]; labels: [N], 0 to K - 1.
    Returns:
      int [K, K].
    """
    counts = np.zeros((log_probs.shape[1],) * 2, int)
    np.add.at(counts, (labels, log_probs.argmax(1)), 1)
    return counts


def calibration(log_probs: np.ndarray, labels: np.ndarray) -> dict:
    """Measures the accuracy and calibration of a classifier.

    Args:
      log_probs: [N, K], up to a constant per image.
      labels: [N], 0 to K - 1.
    Returns:
      'accuracy', its standard error, 'top_5_accuracy' (with 10 or more classes), mean
      'confidence', 'cross_entropy' (nats), 'calibration_error' (mean |accuracy - confidence| over
      15 bins), 'temperature' and 'calibration_error_at_temperature', and 'reliability': [mean
      confidence, accuracy, images] of each bin that is not empty.
    """
    right = log_probs.argmax(1) == labels
    found = {'accuracy': right.mean(), 'accuracy_standard_error': standard_error(right * 1.0)}
    if log_probs.shape[1] >= 10:
        rank = (log_probs > np.take_along_axis(log_probs, labels[:, None], 1)).sum(1)
        found['top_5_accuracy'] = (rank < 5).mean()
    log_posterior = _log_posterior(log_probs, 1.0)
    reliability = _reliability(log_posterior, labels)
    fitting, held_out = slice(0, None, 2), slice(1, None, 2)
    temperature = _temperature(log_probs[fitting], labels[fitting])
    calmed = _log_posterior(log_probs[held_out] if len(labels) > 1 else log_probs, temperature)
    return found | {
        'confidence': np.exp(log_posterior.max(1)).mean(),
        'cross_entropy': _cross_entropy(log_posterior, labels),
        'calibration_error': _calibration_error(reliability),
        'temperature': temperature,
        'calibration_error_at_temperature': _calibration_error(
            _reliability(calmed, labels[held_out] if len(labels) > 1 else labels)
        ),
        'reliability': reliability.tolist(),
    }


def _log_posterior(log_probs, temperature: float):
    scaled = log_probs / temperature
    return scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)


def _cross_entropy(log_posterior, labels) -> float:
    return -np.take_along_axis(log_posterior, labels[:, None], 1).mean()


def _temperature(log_probs, labels) -> float:
    """Finds the temperature of least cross entropy, by golden-section search of its logarithm."""
    loss = lambda t: _cross_entropy(_log_posterior(log_probs, np.exp(t)), labels)  # noqa: E731
    low, high, golden = np.log(1e-2), np.log(1e5), (np.sqrt(5) - 1) / 2
    while high - low > 1e-3:
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return float(np.exp((low + high) / 2))


def _reliability(log_posterior, labels) -> np.ndarray:
    confidence = np.exp(log_posterior.max(1))
    right = log_posterior.argmax(1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    rows = [
        (confidence[bins == b].mean(), right[bins == b].mean(), (bins == b).sum())
        for b in np.unique(bins)
    ]
    return np.array(rows, np.float64)


def _calibration_error(reliability: np.ndarray) -> float:
    confidence, accuracy, count = reliability.T
    return float((count * np.abs(accuracy - confidence)).sum() / count.sum())


def rows(r: dict) -> list[tuple[str, str]]:
    """Returns the rows of the printed table."""
    top_5 = f'; top 5 {r["top_5_accuracy"]:.2%}' if 'top_5_accuracy' in r else ''
    found = [
        ('accuracy of argmax p(x | y)', f'{r["accuracy"]:.2%}  (standard error '
         f'{r["accuracy_standard_error"]:.2%}; {r["images"]} images{top_5})'),
        ('its calibration error', f'{r["calibration_error"]:.4f}  (mean confidence '
         f'{r["confidence"]:.4f}); {r["calibration_error_at_temperature"]:.4f} with log p divided '
         f'by {r["temperature"]:.4g}'),
    ]
    if 'class_accuracy' in r:  # missing in results of version 0.1
        worst = sorted(r['class_accuracy'].items(), key=lambda item: item[1])[:SHOWN_CLASSES]
        found.append((
            'least accurate classes',
            ', '.join(f'{name} {accuracy:.1%}' for name, accuracy in worst),
        ))
    return found
