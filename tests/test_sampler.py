"""A batch follows from (seed, epoch, step) alone; its positives are real ones, and every row has its turn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import random_relevance
from hypothesis import given, settings
from hypothesis import strategies as st

from raexmc_ray.train.sampler import Sampler


def dense(relevance: sp.csr_matrix) -> np.ndarray:
    return relevance.toarray() > 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 50),
    labels=st.integers(1, 12),
    size=st.integers(1, 8),
    P=st.integers(1, 5),
)
def test_a_batch_says_what_the_relevance_says(seed: int, rows: int, labels: int, size: int, P: int) -> None:
    relevance = random_relevance(np.random.default_rng(seed), rows, labels, 0.25)
    y = dense(relevance)
    if y.any(1).sum() < size:
        with pytest.raises(ValueError, match=r"training\.batch_size is .* make the batch smaller"):
            Sampler(relevance, size, P, seed)
        return
    sampler = Sampler(relevance, size, P, seed)
    assert sampler.steps == y.any(1).sum() // size
    batch = sampler.batch(1, sampler.steps - 1)
    mine = y[batch.rows_B]
    assert len(set(batch.rows_B.tolist())) == size, "distinct rows"
    assert mine.any(1).all(), "no row without a label"
    assert np.array_equal(batch.labels_C, np.flatnonzero(batch_columns(batch.labels_C, batch.drawn_BC, labels).any(0)))
    assert np.array_equal(batch.known_BC, mine[:, batch.labels_C]), "known positives: the full relevance"
    assert not (batch.drawn_BC & ~batch.known_BC).any(), "only positives are drawn"
    assert np.array_equal(batch.drawn_BC.sum(1), np.minimum(mine.sum(1), P)), "P, without replacement"
    shared = mine.astype(int) @ mine.T.astype(int) > 0
    assert np.array_equal(batch.shared_BB, shared)


def batch_columns(labels_C: np.ndarray, drawn_BC: np.ndarray, labels: int) -> np.ndarray:
    """bool [B, L]: what was drawn, over all labels."""
    whole = np.zeros((len(drawn_BC), labels), bool)
    whole[:, labels_C] = drawn_BC
    return whole


def test_an_epoch_has_each_labelled_row_once_and_leaves_out_the_rest() -> None:
    relevance = random_relevance(np.random.default_rng(0), 37, 6, 0.3)
    sampler = Sampler(relevance, 5, 1, 0)
    for epoch in range(3):
        seen = Counter(row for step in range(sampler.steps) for row in sampler.batch(epoch, step).rows_B.tolist())
        assert set(seen.values()) == {1}
        assert set(seen) <= set(np.flatnonzero(dense(relevance).any(1)).tolist())
        assert len(seen) == sampler.steps * 5


def test_batches_do_not_depend_on_what_was_asked_before() -> None:
    relevance = random_relevance(np.random.default_rng(1), 40, 9)
    used, fresh = Sampler(relevance, 8, 2, 7), Sampler(relevance, 8, 2, 7)
    for epoch, step in ((0, 0), (3, 1), (0, 2)):
        used.batch(epoch, step)
    one, other = used.batch(2, 1), fresh.batch(2, 1)
    for name in ("rows_B", "labels_C", "drawn_BC", "known_BC", "shared_BB"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_epochs_and_seeds_differ() -> None:
    relevance = random_relevance(np.random.default_rng(2), 60, 9, 0.5)
    batches = [Sampler(relevance, 10, 1, seed).batch(epoch, 0) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    rows = [tuple(batch.rows_B) for batch in batches]
    assert len(set(rows)) == 3


def test_labels_are_drawn_uniformly() -> None:
    relevance = sp.csr_matrix(np.ones((20, 4), np.float32))
    sampler = Sampler(relevance, 20, 1, 0)
    drawn = Counter(
        label
        for epoch in range(100)
        for batch in [sampler.batch(epoch, 0)]
        for label in batch.labels_C[batch.drawn_BC.argmax(1)].tolist()
    )
    assert sum(drawn.values()) == 2000
    assert all(abs(count - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75) for count in drawn.values())
