"""Whether one evaluation is better than another by more than chance: paired bootstrap over the rows.

Rows are drawn with replacement, the same ones for both, as many as there are, again and again; each time the metrics of
both are computed anew, and their difference. The middle 95% of the differences are the interval (Efron and Tibshirani,
An Introduction to the Bootstrap, 1993, chapter 13). Propensity-scored metrics are ratios of means: their numerators and
denominators are drawn together.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from raexmc_ray.evaluation.result import BEST_ROW, Measured
from raexmc_ray.progress import Progress

RESAMPLES = 10_000
CONFIDENCE = 0.95
BLOCK_CELLS = 1 << 24
"""Rows × resamples held at once: 128 MB."""


class Difference(BaseModel):
    """A metric of two evaluations, in percent."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)
    metric: str
    a: float
    b: float
    difference: float
    """b − a."""
    low: float
    high: float
    """Ends of the interval of the difference, at 95% confidence."""
    beyond_chance: bool
    """Whether the interval excludes zero."""


def compare(
    a: Measured, b: Measured, row: str = "both", *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Difference]:
    """What `b` is better or worse by than `a`, in each metric that both have, for a row of the table.

    Deterministic: the seed draws the rows. Raises ValueError where the two are not of the same rows, measured by the
    same weights.
    """
    refuse(a, b, row)
    metrics = [name for name in a.table[row] if name in b.table[row]]
    columns = [side.figures[f"{row}/{name}"] for side in (a, b) for name in metrics]
    ratios = [name for name in metrics if f"{BEST_ROW}/{name}" in a.figures]
    columns += [a.figures[f"{BEST_ROW}/{name}"] for name in ratios]
    columns_RC = np.stack(columns, axis=1)

    def differences(sums_SC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Percent [S, metrics] of a and of b, from column sums over equally many rows."""
        over = np.full((len(sums_SC), len(metrics)), float(len(columns_RC)))
        over[:, [metrics.index(name) for name in ratios]] = sums_SC[:, 2 * len(metrics) :]
        sides = sums_SC[:, : len(metrics)], sums_SC[:, len(metrics) : 2 * len(metrics)]
        return 100 * sides[0] / over, 100 * sides[1] / over

    (a_M,), (b_M,) = differences(columns_RC.sum(0, keepdims=True))
    drawn_a, drawn_b = differences(resampled_sums(columns_RC, resamples, seed))
    edge = 50 * (1 - CONFIDENCE)
    low_M, high_M = np.percentile(drawn_b - drawn_a, [edge, 100 - edge], axis=0)
    return [
        Difference(
            metric=name,
            a=a_M[i],
            b=b_M[i],
            difference=b_M[i] - a_M[i],
            low=low_M[i],
            high=high_M[i],
            beyond_chance=bool(low_M[i] > 0 or high_M[i] < 0),
        )
        for i, name in enumerate(metrics)
    ]


def resampled_sums(columns_RC: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """float64 [S, C]: the sum of each column over R rows that are drawn with replacement, S times."""
    rng = np.random.default_rng(seed)
    rows = len(columns_RC)
    block = max(1, BLOCK_CELLS // rows)
    sums = []
    with Progress("compare", resamples, "resamples") as progress:
        for start in range(0, resamples, block):
            size = min(block, resamples - start)
            times_SR = np.empty((size, rows))
            for i in range(size):
                times_SR[i] = np.bincount(rng.integers(rows, size=rows), minlength=rows)
            sums.append(times_SR @ columns_RC)
            progress.add(size)
    return np.concatenate(sums)


def refuse(a: Measured, b: Measured, row: str = "both") -> None:
    """Raise ValueError unless the two can be compared."""
    for name, side in (("A", a), ("B", b)):
        if row not in side.table:
            raise ValueError(f"{name} has no row {row!r}: it has {', '.join(side.table)}")
    if a.evaluation.test != b.evaluation.test:
        raise ValueError(
            f"A and B were not measured on the same rows: A on {a.evaluation.evaluated:,} rows (fingerprint "
            f"{a.evaluation.test[:12]}), B on {b.evaluation.evaluated:,} ({b.evaluation.test[:12]}): evaluate both on "
            "the same test part"
        )
    if not np.array_equal(a.rows, b.rows):
        raise ValueError("A and B have the figures of different rows: run `raexmc evaluate` again")
    for name in a.table[row]:
        best = [side.figures.get(f"{BEST_ROW}/{name}") for side in (a, b)]
        if best[0] is not None and best[1] is not None and not np.allclose(best[0], best[1], rtol=1e-9):
            raise ValueError(
                f"{name} was not measured by the same propensities: A has A={a.evaluation.propensity_a}, "
                f"B={a.evaluation.propensity_b}, B has A={b.evaluation.propensity_a}, B={b.evaluation.propensity_b}, "
                "over training parts that must be the same, too"
            )
