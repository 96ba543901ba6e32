"""Scores of several tasks as one figure: interquartile mean, probability of improvement, stratified bootstrap.

Source: Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, arXiv 2108.13264; the
definitions are those of their package rliable (Apache-2.0). Here tasks may differ in their number of seeds.
"""

from collections.abc import Callable, Sequence

import numpy as np

from poco_vla.report.curves import Floats

RESAMPLES = 2_000
"""Draws of the bootstrap, as in rliable's examples."""
Scores = Sequence[Floats]
"""Scores of the seeds, [..., S] of each task; leading axes are draws of the bootstrap."""


def interquartile_mean(scores: Scores) -> Floats:
    """Return [...] the mean of the middle half of all scores of all tasks; the quarter cut at either end is rounded
    down."""
    pooled = np.sort(np.concatenate(list(scores), axis=-1), axis=-1)
    cut = pooled.shape[-1] // 4
    return np.asarray(pooled[..., cut : pooled.shape[-1] - cut].mean(axis=-1))


def probability_of_improvement(scores: Scores, others: Scores) -> Floats:
    """Return [...] the probability that a run is better than another algorithm's on the same task, the mean over tasks;
    equal runs count half.

    Args:
        scores: of each task, seeds of the one algorithm.
        others: of the same tasks in the same order, seeds of the other.
    """
    rates = []
    for ours, theirs in zip(scores, others, strict=True):
        gaps = np.sign(ours[..., :, None] - theirs[..., None, :])
        rates.append((gaps.mean(axis=(-2, -1)) + 1) / 2)
    return np.asarray(np.mean(rates, axis=0))


def stratified_interval(
    statistic: Callable[..., Floats], *scores: Scores, resamples: int = RESAMPLES
) -> list[float] | None:
    """Return the ends of a statistic's 95 % percentile bootstrap: the seeds of each task are drawn anew, tasks stay.
    None if no task has a second seed, which would be no interval.

    Args:
        statistic: of one or several algorithms' scores.
        scores: of each algorithm, drawn independently of the others'.
        resamples: draws.
    """
    if all(len(task) == 1 for one in scores for task in one):
        return None
    generator = np.random.default_rng(0)

    def drawn(task: Floats) -> Floats:
        return task[generator.integers(len(task), size=(resamples, len(task)))]

    values = statistic(*([drawn(task) for task in one] for one in scores))
    low, high = np.quantile(values, (0.025, 0.975))
    return [float(low), float(high)]
