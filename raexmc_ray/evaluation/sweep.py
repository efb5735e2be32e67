"""Many settings over the same retrieved keys: no key is searched for twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import scipy.sparse as sp

from raexmc_ray.corpus import Corpus
from raexmc_ray.evaluation.retrieve import Retrieved, deepest_of, retrieve
from raexmc_ray.local import Memory
from raexmc_ray.memory.hits import Hits
from raexmc_ray.metrics import inverse_propensity, score_table
from raexmc_ray.recipe import METRICS, CorpusSection, Neighbours, PredictionSection

FIGURES = ("P@1", "P@5", "PSP@1", "PSP@5", "R@10")
"""What settings are chosen by: head and tail, first and more."""
SWEPT = tuple(name for name in METRICS if name != "R@100")
DEPTH = 10
"""Labels predicted: the deepest of them is R@10."""

Figures = dict[str, float]


class Sweep:
    """The predictions of each of some settings for the rows that it is given, a batch at a time."""

    def __init__(self, settings: Iterable[PredictionSection]) -> None:
        self.settings = list(dict.fromkeys(settings))
        self._predicted: dict[PredictionSection, list[np.ndarray]] = {one: [] for one in self.settings}

    def add(self, batch: Retrieved) -> None:
        """The next rows."""
        cuts: dict[Neighbours, Hits] = {}
        for one in self.settings:
            if one.neighbours not in cuts:
                cuts[one.neighbours] = batch.hits(one.neighbours)
            found = batch.predict(one, DEPTH, cuts[one.neighbours])
            self._predicted[one].append(found.labels_Bk.astype(np.int32))

    def figures(self, relevance: sp.csr_matrix, inverse_propensity_L: np.ndarray) -> dict[PredictionSection, Figures]:
        """{settings: {metric: percent}} over all rows so far, whose labels are `relevance`, CSR [B, L]."""
        weights = inverse_propensity_L
        return {
            one: score_table(np.concatenate(parts), relevance, weights, recall_at=(DEPTH,))
            for one, parts in self._predicted.items()
        }


def grid(
    base: PredictionSection,
    lambdas: Iterable[float] = (),
    temperatures: Iterable[float] = (),
    neighbours: Iterable[Neighbours] = (),
) -> list[PredictionSection]:
    """`base` with all combinations of what is given; of what is not given it keeps its own."""
    combinations = product(
        list(lambdas) or [base.lambda_], list(temperatures) or [base.temperature], list(neighbours) or [base.neighbours]
    )
    names = ("lambda_", "temperature", "neighbours")
    return [base.model_copy(update=dict(zip(names, values, strict=True))) for values in combinations]


def sweep(
    memory: Memory, corpus: Corpus, section: CorpusSection, settings: Sequence[PredictionSection]
) -> dict[PredictionSection, Figures]:
    """{settings: {metric: percent}} over the test part of `corpus`, from one retrieval.

    To choose settings, give it a corpus whose test part was held out of training (`corpus.holdout`).
    """
    queries_BD = memory.encoder.encode(corpus.test.texts["text"].to_pylist())
    swept = Sweep(settings)
    depth = max(deepest_of(one.neighbours) for one in settings)
    for batch in retrieve(memory, queries_BD, depth, corpus.test.filtered):
        swept.add(batch)
    inverse_L = inverse_propensity(corpus.train.relevance, section.propensity_a, section.propensity_b)
    return swept.figures(corpus.test.relevance, inverse_L)


def choose(swept: Mapping[PredictionSection, Figures], metrics: Sequence[str] = FIGURES) -> PredictionSection:
    """The settings with the best mean of these metrics, each relative to its best in the sweep; of equals the first."""
    best = {name: max(figures[name] for figures in swept.values()) or 1.0 for name in metrics}
    return max(swept, key=lambda one: sum(swept[one][name] / best[name] for name in metrics))
