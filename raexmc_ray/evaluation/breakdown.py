"""Which labels the predictions get right: head, torso and tail, and the tenths of the training pairs."""

from __future__ import annotations

import numpy as np

from raexmc_ray.evaluation.result import Breakdown, LabelGroup
from raexmc_ray.metrics import Judged, by_group, coverage, frequency_groups

DEPTH = 10
"""The first so many predictions are looked at."""


class GroupCounts:
    """Counts what each row of the table finds of frequent and of rare labels."""

    def __init__(self, counts_L: np.ndarray, depth: int = DEPTH) -> None:
        """counts_L: int64, training instances of each label. depth: labels predicted, where fewer than DEPTH."""
        self._counts_L, self._k = counts_L, min(DEPTH, depth)
        self._groups = [frequency_groups(counts_L, number) for number in (3, 10)]
        self._found: list[dict[str, list[dict[str, float]]]] = [{}, {}]
        self._covered: dict[str, dict[str, float]] = {}
        self._relevant = np.empty(0, np.int32)

    def add(self, name: str, judged: Judged) -> None:
        """One more row of the table: all on the same rows of the test part."""
        self._relevant = judged.relevance.indices
        self._covered[name] = coverage(judged, self._k)
        for group_L, found in zip(self._groups, self._found, strict=True):
            found[name] = by_group(judged, group_L, self._k)

    def breakdown(self) -> Breakdown:
        """Everything counted so far."""
        thirds, tenths = map(self._label_groups, self._groups, self._found)
        return Breakdown(k=self._k, thirds=thirds, tenths=tenths, covered=self._covered)

    def _label_groups(self, group_L: np.ndarray, found: dict[str, list[dict[str, float]]]) -> list[LabelGroup]:
        """One for each group that has a label: labels that are very frequent may fill several shares of the pairs."""
        pairs = np.bincount(group_L[self._relevant], minlength=int(group_L.max()) + 1)
        groups = []
        for group in np.unique(group_L).tolist():
            counts = self._counts_L[group_L == group]
            groups.append(
                LabelGroup(
                    labels=len(counts),
                    most=int(counts.max()),
                    least=int(counts.min()),
                    pairs=int(pairs[group]),
                    precision={name: rows[group]["P"] for name, rows in found.items()},
                    recall={name: rows[group]["R"] for name, rows in found.items()} if pairs[group] else {},
                )
            )
        return groups
