"""How good the encoder is while it trains: prediction on held-out rows, from the memory that it would make now."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from raexmc_ray.encoder import TextEncoder
from raexmc_ray.memory.hits import Hits, merge_hits
from raexmc_ray.metrics import score_table
from raexmc_ray.predict import BY_SIMILARITY, aggregate
from raexmc_ray.ragged import longest, ragged_take
from raexmc_ray.recipe import MOST_NEIGHBOURS, Neighbours, Recipe
from raexmc_ray.tokens import Tokens
from raexmc_ray.train.mining import Part, all_rows, embed_part, search

DEPTH = 100
"""Labels predicted: the deepest metric is R@100."""
BLOCK_ROWS = 4096
"""Rows of a rank that are predicted at once: the votes of what they retrieve are in memory together."""


@dataclass(frozen=True)
class HeldOut:
    """Rows held out of the training: tokens of B texts, CSR [B, L] of their labels and of their filter pairs.

    inverse_propensity_L: float64, of the training without them.
    """

    tokens: Tokens
    relevance: sp.csr_matrix
    filtered: sp.csr_matrix
    inverse_propensity_L: np.ndarray


def validate(
    encoder: TextEncoder, held_out: HeldOut, instances: Part, labels: Part, relevance: sp.csr_matrix, recipe: Recipe
) -> dict[str, float]:
    """{metric: percent, "metric labels only": percent, "metric instances only": percent} on the held-out rows.

    instances, labels: this rank's part of the keys. relevance: CSR [N, L] of the training. The settings are those
    of the recipe's `prediction`. The same result on every rank.
    """
    queries = embed_part(encoder, held_out.tokens, recipe.encoder.batch_size, instances.first, instances.ranks)
    settings = recipe.prediction
    b = settings.neighbours.joint or max(settings.neighbours.instances or 0, settings.neighbours.labels or 0)
    b = min(max(b, DEPTH + longest(held_out.filtered.indptr)), MOST_NEIGHBOURS)
    instances_Bb, instance_scores_Bb = search(queries, instances, b)
    labels_Bb, label_scores_Bb = search(queries, labels, b)
    rows = {
        "": (settings.lambda_, settings.temperature, settings.neighbours),
        " labels only": (0.0, BY_SIMILARITY, Neighbours(instances=0, labels=b)),
        " instances only": (1.0, settings.temperature, Neighbours(instances=b, labels=0)),
    }
    predicted: dict[str, list[np.ndarray]] = {name: [] for name in rows}
    for first in range(0, max(len(queries.rows), 1), BLOCK_ROWS):
        block = slice(first, first + BLOCK_ROWS)
        found = [
            _hits(instances_Bb[block], instance_scores_Bb[block], relevance),
            _hits(labels_Bb[block], label_scores_Bb[block], None, first_key=relevance.shape[0]),
        ]
        for name, (lambda_, temperature, neighbours) in rows.items():
            answers = aggregate(
                merge_hits(found, neighbours),
                lambda_=lambda_,
                temperature=temperature,
                k=DEPTH,
                exclude=held_out.filtered[queries.rows[block]],
            )
            predicted[name].append(answers.labels_Bk)
    figures: dict[str, float] = {}
    for name, blocks in predicted.items():
        labels_Bk = all_rows(np.concatenate(blocks), queries)
        table = score_table(labels_Bk, held_out.relevance, held_out.inverse_propensity_L)
        figures |= {f"{metric}{name}": value for metric, value in table.items()}
    return figures


def _hits(rows: np.ndarray, scores: np.ndarray, relevance: sp.csr_matrix | None, first_key: int = 0) -> Hits:
    """What `search` found as hits: of instances, which vote for their labels, or of labels (no `relevance`)."""
    cells = rows.ravel()
    found = cells[cells >= 0]
    if relevance is None:
        votes, lengths = found, (cells >= 0).astype(np.int64)
    else:
        votes, _ = ragged_take(relevance.indices, relevance.indptr, found)
        lengths = np.where(cells >= 0, np.diff(relevance.indptr)[cells], 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    keys = np.where(rows >= 0, rows.astype(np.int64) + first_key, -1)
    is_label = (rows >= 0) & (relevance is None)
    return Hits(keys, scores, is_label, votes.astype(np.int32), offsets, snapshot="")
