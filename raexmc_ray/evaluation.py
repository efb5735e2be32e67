"""How good a memory is: the dual encoder alone, the instances alone, both, and popularity, in one table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

import numpy as np
import scipy.sparse as sp

from raexmc_ray.corpus import Corpus
from raexmc_ray.local import Memory
from raexmc_ray.memory.hits import Hits
from raexmc_ray.metrics import inverse_propensity, score_table
from raexmc_ray.predict import aggregate
from raexmc_ray.progress import Progress
from raexmc_ray.recipe import METRICS, CorpusSection, Neighbours, PredictionSection

DEPTH = 100
"""Labels predicted for a row: the deepest metric is R@100."""
BATCH = 256
"""Rows searched at once."""

Table = dict[str, dict[str, float]]


def evaluate(memory: Memory, corpus: Corpus, section: CorpusSection, settings: PredictionSection) -> Table:
    """{row: {metric: percent}} over the test part of `corpus`, with the filter pairs dropped.

    The rows: `popularity` (the labels with most training instances for everyone), `labels only` (the dual
    encoder: the nearest labels), `instances only` (λ = 1 over the nearest instances), `both` (`settings`).
    """
    b = settings.neighbours.joint or ((settings.neighbours.instances or 0) + (settings.neighbours.labels or 0))
    b = max(b, DEPTH)
    rows: dict[str, PredictionSection] = {
        "labels only": settings.model_copy(update={"lambda_": 0.0, "neighbours": Neighbours(instances=0, labels=b)}),
        "instances only": settings.model_copy(update={"lambda_": 1.0, "neighbours": Neighbours(instances=b, labels=0)}),
        "both": settings,
    }
    queries_BD = memory.encoder.encode(corpus.test.texts["text"].to_pylist())
    inverse_L = inverse_propensity(corpus.train.relevance, section.propensity_a, section.propensity_b)
    predicted = {"popularity": _popular(corpus)}
    with Progress("evaluate", len(rows) * len(queries_BD), "rows") as progress:
        for name, row in rows.items():
            parts = []
            for part, hits in search_in_batches(memory, queries_BD, row.neighbours):
                exclude = corpus.test.filtered[part]
                parts.append(
                    aggregate(
                        hits, lambda_=row.lambda_, temperature=row.temperature, k=DEPTH, exclude=exclude
                    ).labels_Bk
                )
                progress.add(len(parts[-1]))
            predicted[name] = np.concatenate(parts)
    return {name: score_table(labels, corpus.test.relevance, inverse_L) for name, labels in predicted.items()}


def search_in_batches(memory: Memory, queries_BD: np.ndarray, neighbours: Neighbours) -> Iterator[tuple[slice, Hits]]:
    """(rows, their hits), a batch at a time."""
    for start in range(0, len(queries_BD), BATCH):
        part = slice(start, min(start + BATCH, len(queries_BD)))
        yield part, memory.search(queries_BD[part], neighbours)


def sweep(
    memory: Memory,
    corpus: Corpus,
    section: CorpusSection,
    neighbours: Neighbours,
    lambdas: Iterable[float],
    temperatures: Iterable[float],
) -> dict[tuple[float, float], dict[str, float]]:
    """{(λ, τ): {metric: percent}} over the test part of `corpus`, from one retrieval.

    To choose settings, give it a corpus whose test part was held out of training (`corpus.holdout`).
    """
    queries_BD = memory.encoder.encode(corpus.test.texts["text"].to_pylist())
    found = list(search_in_batches(memory, queries_BD, neighbours))
    inverse_L = inverse_propensity(corpus.train.relevance, section.propensity_a, section.propensity_b)
    results = {}
    for lambda_, temperature in product(lambdas, temperatures):
        predicted = [
            aggregate(
                hits, lambda_=lambda_, temperature=temperature, k=DEPTH, exclude=corpus.test.filtered[part]
            ).labels_Bk
            for part, hits in found
        ]
        results[lambda_, temperature] = score_table(np.concatenate(predicted), corpus.test.relevance, inverse_L)
    return results


def _popular(corpus: Corpus) -> np.ndarray:
    """int64 [B, DEPTH]: the most frequent training labels, less the row's filter pairs."""
    counts = np.bincount(corpus.train.relevance.indices, minlength=len(corpus.labels))
    filtered: sp.csr_matrix = corpus.test.filtered
    slack = int(np.diff(filtered.indptr).max(initial=0))
    ranked = np.argsort(-counts, kind="stable")[: DEPTH + slack]
    labels = np.tile(ranked, (len(corpus.test), 1))
    dropped = filtered[:, ranked].toarray() > 0
    order = np.argsort(dropped, axis=1, kind="stable")[:, :DEPTH]
    predicted = np.where(np.take_along_axis(dropped, order, 1), -1, np.take_along_axis(labels, order, 1))
    return np.pad(predicted, ((0, 0), (0, DEPTH - predicted.shape[1])), constant_values=-1)


def format_table(table: Mapping[str, Mapping[str, float]], names: Sequence[str] | None = None) -> str:
    """The table as aligned text, a row a line, in percent: METRICS, unless other names are given."""
    names = names or METRICS
    widths = [max(len(name), 5) for name in names]
    first = max(len(row) for row in table)
    lines = [" " * first + "  " + "  ".join(f"{n:>{w}}" for n, w in zip(names, widths, strict=True))]
    for row, figures in table.items():
        cells = "  ".join(f"{figures[n]:>{w}.2f}" for n, w in zip(names, widths, strict=True))
        lines.append(f"{row:<{first}}  {cells}")
    return "\n".join(lines)
