"""How good a memory is: the dual encoder alone, the instances alone, both, and popularity, in one table."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp

from raexmc_ray.corpus import Corpus
from raexmc_ray.evaluation.breakdown import GroupCounts
from raexmc_ray.evaluation.result import BEST_ROW, Evaluation, Measured, Table
from raexmc_ray.evaluation.retrieve import Retrieved, Stopwatch, deepest_of, encode, retrieve, width_of
from raexmc_ray.local import Memory
from raexmc_ray.memory.snapshot import Manifest, memory_id
from raexmc_ray.metrics import BEST, PRECISION_AT, RECALL_AT, inverse_propensity, judge, metrics_of, row_figures
from raexmc_ray.predict import BY_SIMILARITY, Predictions
from raexmc_ray.progress import Progress
from raexmc_ray.recipe import MOST_NEIGHBOURS, CorpusSection, Neighbours, PredictionSection, Recipe

DEPTH = 100
"""Labels predicted for a row: the deepest metric is R@100."""
POPULARITY, LABELS_ONLY, INSTANCES_ONLY, BOTH = "popularity", "labels only", "instances only", "both"
MADE_BY = ("encoder", "training", "memory")
"""Sections of a recipe that say how a memory is made."""
logger = logging.getLogger("raexmc_ray")


class Observer(Protocol):
    """Sees each batch of rows as it is evaluated, and so learns more of the same retrieval."""

    depth: int
    """How many instances and labels it wants to see retrieved."""

    def see(self, batch: Retrieved, predicted: Mapping[str, Predictions]) -> None:
        """What was retrieved for some rows, and predicted: {row of the table: the best DEPTH labels}."""


def evaluate(
    memory: Memory,
    corpus: Corpus,
    section: CorpusSection,
    settings: PredictionSection,
    *,
    recipe: Recipe | None = None,
    observer: Observer | None = None,
) -> Measured:
    """Measure a memory on the test part of `corpus`, with the filter pairs dropped.

    The rows of the table: `popularity` (the labels with most training instances for everyone), `labels only` (the dual
    encoder: the nearest labels, at any τ), `instances only` (λ = 1 over the nearest instances), `both` (`settings`).
    They come from one retrieval, where the kind of index gives the same keys for any number of neighbours
    (`CUTTING_KINDS`). Texts are encoded in this process: for millions of rows, score them on a cluster and use
    `evaluate_predictions`.

    recipe: of the run that measures; `recipe_of` says what is recorded. That the memory was built from another one is
    logged. Raises ValueError where no row has a label, and where the memory is not of this corpus's training part and
    labels.
    """
    b = min(max(width_of(settings.neighbours), DEPTH + corpus.test.most_filtered), MOST_NEIGHBOURS)
    nearest = {"lambda_": 0.0, "temperature": BY_SIMILARITY, "neighbours": Neighbours(instances=0, labels=b)}
    rows: dict[str, PredictionSection] = {
        LABELS_ONLY: settings.model_copy(update=nearest),
        INSTANCES_ONLY: settings.model_copy(update={"lambda_": 1.0, "neighbours": Neighbours(instances=b, labels=0)}),
        BOTH: settings,
    }
    depth = max([b, deepest_of(settings.neighbours), observer.depth if observer else 0])
    refuse_unlabelled(corpus)
    refuse_foreign(memory.manifest, corpus)
    made_by = memory.manifest.recipe or {}
    if recipe:
        _warn_of_another(recipe, memory.manifest.id, made_by)
    clock = Stopwatch()
    with clock.stage("encode"):
        queries_BD = encode(memory, corpus.test)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in rows}
    with Progress("evaluate", len(queries_BD), "rows") as progress:
        for batch in retrieve(memory, queries_BD, depth, corpus.test.filtered, stopwatch=clock):
            predicted = {}
            for name, row in rows.items():
                with clock.stage("search"):
                    hits = batch.hits(row.neighbours)
                with clock.stage("aggregate"):
                    predicted[name] = batch.predict(row, DEPTH, hits)
                parts[name].append(predicted[name].labels_Bk.astype(np.int32))
            if observer:
                with clock.stage("report"):
                    observer.see(batch, predicted)
            progress.add(len(batch.deepest.key_ids_Bb))
    labels = {POPULARITY: popular(corpus, DEPTH)} | {name: np.concatenate(found) for name, found in parts.items()}
    return measure(
        labels,
        corpus,
        section,
        clock=clock,
        settings=settings,
        snapshot=memory.manifest.id,
        recipe=recipe_of(recipe, settings, made_by) if recipe else None,
    )


def measure(
    labels: Mapping[str, np.ndarray],
    corpus: Corpus,
    section: CorpusSection,
    *,
    depth: int = DEPTH,
    clock: Stopwatch | None = None,
    settings: PredictionSection | None = None,
    snapshot: str | None = None,
    recipe: dict[str, Any] | None = None,
) -> Measured:
    """The evaluation of predicted labels, {row of the table: integers [B, depth], −1 for none}, on the test part.

    depth: labels that were predicted; metrics that need more are left out. recipe: what is recorded of it, from
    `recipe_of`. Raises ValueError.
    """
    clock = clock or Stopwatch()
    precision_at, recall_at = ([k for k in wanted if k <= depth] for wanted in (PRECISION_AT, RECALL_AT))
    table: Table = {}
    figures: dict[str, np.ndarray] = {}
    with clock.stage("metrics"):
        inverse_L = inverse_propensity(corpus.train.relevance, section.propensity_a, section.propensity_b)
        groups = GroupCounts(np.bincount(corpus.train.relevance.indices, minlength=len(corpus.labels)), depth)
        for name, predicted in labels.items():
            judged = judge(predicted, corpus.test.relevance, depth)
            groups.add(name, judged)
            of_rows = row_figures(judged, inverse_L, precision_at, recall_at)
            table[name] = metrics_of(of_rows)
            for metric, values in of_rows.items():
                best = metric.startswith(BEST)
                figures[f"{BEST_ROW}/{metric.removeprefix(BEST)}" if best else f"{name}/{metric}"] = values
        rows = judged.rows
    evaluation = Evaluation(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        snapshot=snapshot,
        corpus=corpus.fingerprint,
        test=corpus.test.fingerprint,
        evaluated=len(rows),
        excluded=len(corpus.test) - len(rows),
        settings=settings,
        propensity_a=section.propensity_a,
        propensity_b=section.propensity_b,
        table=table,
        breakdown=groups.breakdown(),
        seconds={stage: round(seconds, 3) for stage, seconds in clock.seconds.items()},
        recipe=recipe,
    )
    return Measured(evaluation, rows, figures)


def recipe_of(run: Recipe, settings: PredictionSection | None, made_by: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of what is measured, for its file: how the memory is made, from the recipe that it was built from
    (`made_by`); the prediction's settings; corpus and cluster of the run that measures. What is not known is left out:
    the recipe of the run does not say it, as it may have been changed since, or be of another memory."""
    record, known = run.record(), {name: made_by[name] for name in MADE_BY if name in made_by}
    if settings:
        known["prediction"] = settings.model_dump(mode="json", by_alias=True)
    return {"corpus": record["corpus"], **known, "cluster": record["cluster"]}


def _warn_of_another(run: Recipe, snapshot: str, made_by: Mapping[str, Any]) -> None:
    """Log which settings a memory was built with otherwise than `run` says, of those that both know."""
    record = run.record()
    others = [
        f"{section}.{name}"
        for section in MADE_BY
        for name, value in made_by.get(section, {}).items()
        if record[section].get(name, value) != value
    ]
    if others:
        logger.warning(
            "snapshot %s was built from a recipe that differs in %s: it is measured, and recorded, as it was built. To "
            "measure this recipe: raexmc train, raexmc build",
            snapshot, ", ".join(others),
        )  # fmt: skip


def refuse_unlabelled(corpus: Corpus) -> None:
    """Raise ValueError where the test part has nothing to measure."""
    if len(corpus.test) == corpus.test.unlabelled:
        raise ValueError(
            f"the corpus has no test row with a label, of {len(corpus.test):,}: add a test part, or hold training rows "
            "out of everything (corpus.holdout=0.1), and build the memory again"
        )


def refuse_foreign(manifest: Manifest, corpus: Corpus) -> None:
    """Raise ValueError where a memory is not of the training part and the labels of this corpus: its keys would be
    taken for others, and rows that are held out here may be among them."""
    made_of = manifest.encoder_fingerprint, manifest.shards, manifest.index, manifest.defaults
    if memory_id(corpus.fingerprint, *made_of) != manifest.id:
        raise ValueError(
            f"snapshot {manifest.id} is not of this corpus: which key is whose cannot be told, and rows held out here "
            "may be in it. Give the recipe that it was built from (corpus.path, fields and holdout), or build it anew"
        )


def popular(corpus: Corpus, depth: int) -> np.ndarray:
    """int32 [B, depth]: the most frequent training labels, less the row's filter pairs."""
    counts = np.bincount(corpus.train.relevance.indices, minlength=len(corpus.labels))
    ranked = np.argsort(-counts, kind="stable")[: depth + corpus.test.most_filtered].astype(np.int32)
    first = np.pad(ranked[:depth], (0, max(0, depth - len(ranked))), constant_values=-1)
    predicted = np.tile(first, (len(corpus.test), 1))
    filtered: sp.csr_matrix = corpus.test.filtered[:, ranked]
    some = np.flatnonzero(np.diff(filtered.indptr))  # rows that must do without a popular label
    dropped = filtered[some].toarray() > 0
    order = np.argsort(dropped, axis=1, kind="stable")[:, :depth]
    left = np.where(np.take_along_axis(dropped, order, 1), -1, ranked[order])
    predicted[some, : left.shape[1]] = left
    return predicted
