"""A batch follows from (seed, epoch, step) and what was mined; its positives are real ones, every row has its turn,
and the ranks' views of it fit together."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import random_relevance
from hypothesis import given, settings
from hypothesis import strategies as st

from raexmc_ray.train.sampler import Batch, Mined, Pairs, Sampler


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
    drawn, known = (cells(pairs, len(batch.labels_C)) for pairs in (batch.drawn, batch.known))
    assert (np.diff(batch.labels_C) > 0).all(), "distinct and ascending"
    assert drawn.any(0).all(), "no label that nobody drew"
    assert np.array_equal(known, mine[:, batch.labels_C]), "known positives: the full relevance"
    assert not (drawn & ~known).any(), "only positives are drawn"
    assert np.array_equal(drawn.sum(1), np.minimum(mine.sum(1), P)), "P, without replacement"
    shared = mine.astype(int) @ mine.T.astype(int) > 0
    assert np.array_equal(cells(batch.shared, size), shared)


def cells(pairs: Pairs, width: int) -> np.ndarray:
    """bool [rows, width]: the pairs as a matrix."""
    matrix = np.zeros((len(pairs.offsets) - 1, width), bool)
    matrix[np.repeat(np.arange(len(matrix)), np.diff(pairs.offsets)), pairs.columns] = True
    return matrix


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.sampled_from([2, 3, 4]), M=st.integers(0, 3))
def test_the_ranks_views_are_one_batch(seed: int, ranks: int, M: int) -> None:
    rng = np.random.default_rng(seed)
    relevance = random_relevance(rng, 60, 12, 0.3)
    labels = np.argsort(rng.random((60, 12)), axis=1)[:, :5]
    wrong = np.where(dense(relevance)[np.arange(60)[:, None], labels], -1, labels).astype(np.int32)
    mined = Mined(np.empty(0, np.int64), np.zeros(1, np.int64), wrong)

    def view(rank: int, ranks: int) -> Batch:
        sampler = Sampler(relevance, 12, 2, seed, mined_labels=M, rank=rank, ranks=ranks)
        sampler.use(mined)
        return sampler.batch(1, 1)

    whole, views = view(0, 1), [view(rank, ranks) for rank in range(ranks)]
    for part in views:
        assert np.array_equal(part.rows_B, whole.rows_B)
        assert np.array_equal(part.labels_C, whole.labels_C), "every rank knows every rank's labels"
    for name, width in (("drawn", len(whole.labels_C)), ("known", len(whole.labels_C)), ("shared", 12)):
        parts = [cells(getattr(part, name), width) for part in views]
        assert np.array_equal(np.concatenate(parts), cells(getattr(whole, name), width)), name
    assert np.array_equal(cells(whole.known, len(whole.labels_C)), dense(relevance)[whole.rows_B][:, whole.labels_C])
    extra = ~cells(whole.drawn, len(whole.labels_C)).any(0)
    if M == 0:
        assert not extra.any()
    else:
        assert set(whole.labels_C[extra].tolist()) <= set(wrong[whole.rows_B].ravel().tolist())


def test_batches_of_neighbours_are_made_of_whole_groups() -> None:
    relevance = sp.csr_matrix(np.ones((48, 1), np.float32))
    grouped = np.random.default_rng(0).permutation(48)
    sampler = Sampler(relevance, 12, 1, 0)
    sampler.use(Mined(grouped, np.arange(0, 49, 4), np.empty((48, 0), np.int32)))
    for epoch in range(2):
        rows = np.concatenate([sampler.rows(epoch, step) for step in range(sampler.steps)])
        assert sorted(rows.tolist()) == list(range(48))
        together = {frozenset(group) for group in grouped.reshape(-1, 4).tolist()}
        assert {frozenset(group) for group in rows.reshape(-1, 4).tolist()} == together
    assert not np.array_equal(sampler.rows(0, 0), sampler.rows(1, 0)), "the groups are shuffled each epoch"


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
    assert np.array_equal(one.rows_B, other.rows_B)
    assert np.array_equal(one.labels_C, other.labels_C)
    assert np.array_equal(one.drawn.columns, other.drawn.columns)


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
        for label in batch.labels_C[batch.drawn.columns].tolist()
    )
    assert sum(drawn.values()) == 2000
    assert all(abs(count - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75) for count in drawn.values())
