"""Scores as probabilities.

p̂ of a label is the share of the softmax mass, weighed by λ or 1 − λ, that votes for it. It orders the labels of a text,
but it is no probability: a label for which every key votes gets max(λ, 1 − λ) at most, the p̂ of a text's labels add up
to what its keys have of labels, not to how many are right, and at a low temperature a single key may have all the mass.
So its log-odds are shifted and divided by a temperature, σ((logit p̂ + shift) / temperature), the two numbers with the
least log loss: temperature scaling with the shift of Platt's method, whose smoothed targets keep both finite (Platt,
Probabilistic outputs for support vector machines, 1999; Guo et al., On calibration of modern neural networks, 2017).
It is monotone: no label changes its place. They are fitted on one half of the rows, and measured on the other.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from raexmc_ray.report.findings import Bin, Calibration, Reliability, Threshold

DEPTH = 10
"""Labels of a row that are looked at: the first so many."""
BINS, LEAST_IN_BIN = 15, 20
LEAST_ROWS = 10
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SMALLEST = 1e-9
"""Scores are kept so far from 0 and 1, whose log-odds are infinite."""


def calibrate(scores_Rk: np.ndarray, right_Rk: np.ndarray, counts_R: np.ndarray, seed: int = 0) -> Calibration | None:
    """Fit on the one half of the rows and measure on the other; nothing where there are too few rows.

    scores_Rk: float, p̂ of the first labels, 0 where there is none. right_Rk: bool. counts_R: labels that each row has.
    """
    if len(scores_Rk) < LEAST_ROWS:
        return None
    order = np.random.default_rng(seed).permutation(len(scores_Rk))
    fitted, measured = order[::2], order[1::2]
    some = scores_Rk[fitted] > 0
    if not some.any() or not (scores_Rk[measured] > 0).any():
        return None
    temperature, shift = fit(scores_Rk[fitted][some], right_Rk[fitted][some])
    scores_Rk, right_Rk = scores_Rk[measured], right_Rk[measured]
    given_Rk = scores_Rk > 0
    probabilities_Rk = np.where(given_Rk, probability(scores_Rk, temperature, shift), 0.0)
    right = right_Rk[given_Rk]
    return Calibration(
        temperature=temperature,
        shift=shift,
        depth=scores_Rk.shape[1],
        fitted_rows=len(fitted),
        measured_rows=len(measured),
        scores=reliability(scores_Rk[given_Rk].astype(np.float64), right),
        probabilities=reliability(probabilities_Rk[given_Rk], right),
        thresholds=[
            _threshold(probabilities_Rk, right_Rk, int(counts_R[measured].sum()), at, temperature, shift)
            for at in THRESHOLDS
        ],
    )


def probability(scores: np.ndarray, temperature: float, shift: float) -> np.ndarray:
    """float64: σ((logit p̂ + shift) / temperature)."""
    return expit((_log_odds(scores) + shift) / temperature)


def fit(scores: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """(temperature, shift) with the least log loss. scores: float [n]. right: bool [n]."""
    x, rights = _log_odds(scores), int(right.sum())
    targets = np.where(right, (rights + 1) / (rights + 2), 1 / (len(right) - rights + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, intercept = np.exp(parameters[0]), parameters[1]  # a slope above 0: the order of labels stays
        z = slope * x + intercept
        value = float(np.mean(np.logaddexp(0, z) - targets * z))
        error = expit(z) - targets
        return value, np.array([np.mean(error * x) * slope, np.mean(error)])

    log_slope, intercept = minimize(loss, np.zeros(2), jac=True, method="BFGS").x
    temperature = float(np.exp(-np.clip(log_slope, -10, 10)))
    return temperature, float(intercept) * temperature


def reliability(probabilities: np.ndarray, right: np.ndarray) -> Reliability:
    """How far they can be believed: float64 [n], bool [n]; n is above 0."""
    order = np.argsort(probabilities, kind="stable")
    bins = max(1, min(BINS, len(order) // LEAST_IN_BIN))
    found = [
        Bin(predictions=len(part), probability=float(probabilities[part].mean()), right=float(right[part].mean()))
        for part in np.array_split(order, bins)
    ]
    clipped = np.clip(probabilities, SMALLEST, 1 - SMALLEST)
    return Reliability(
        bins=found,
        error=sum(one.predictions * abs(one.probability - one.right) for one in found) / len(order),
        log_loss=float(-np.mean(np.where(right, np.log(clipped), np.log1p(-clipped)))),
        brier=float(np.mean((probabilities - right) ** 2)),
    )


def _threshold(
    probabilities_Rk: np.ndarray, right_Rk: np.ndarray, pairs: int, at: float, temperature: float, shift: float
) -> Threshold:
    given_Rk = probabilities_Rk >= at
    given, right = int(given_Rk.sum()), int((given_Rk & right_Rk).sum())
    return Threshold(
        probability=at,
        score=float(expit(logit(at) * temperature - shift)),
        precision=right / given if given else None,
        recall=right / max(1, pairs),
        rows=float(given_Rk.any(1).mean()),
    )


def _log_odds(scores: np.ndarray) -> np.ndarray:
    return logit(np.clip(scores.astype(np.float64), SMALLEST, 1 - SMALLEST))
