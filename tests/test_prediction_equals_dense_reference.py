"""Prediction is softmax(qKᵀ/τ)V over the hits, in plain loops; equal scores are ordered by label."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import random_relevance
from hypothesis import given, settings
from hypothesis import strategies as st

from raexmc_ray.memory.hits import Hits
from raexmc_ray.predict import aggregate, vote_evidence


def hits_of(rows: list[list[tuple[int, float, bool, list[int]]]]) -> Hits:
    """Hits from rows of (key id, score, whether a label, votes), padded to the longest row."""
    width = max(map(len, rows))
    cells = [cell for row in rows for cell in [*row, *[(-1, -math.inf, False, [])] * (width - len(row))]]
    ids, scores, is_label, votes = zip(*cells, strict=True)
    shape = (len(rows), width)
    return Hits(
        np.array(ids, np.int64).reshape(shape),
        np.array(scores, np.float32).reshape(shape),
        np.array(is_label, bool).reshape(shape),
        np.array([label for vote in votes for label in vote], np.int32),
        np.cumsum([0, *map(len, votes)]),
        "s",
    )


def dense(row: list, lambda_: float, tau: float) -> dict[int, dict[int, float]]:
    """{label: {key id: what it gives}} by the formula, with no trick for stability."""
    total = sum(math.exp(float(np.float32(score)) / tau) for _, score, _, _ in row)
    votes: dict[int, dict[int, float]] = {}
    for key, score, is_label, labels in row:
        for label in labels:
            value = 1 - lambda_ if is_label else lambda_
            if value:
                votes.setdefault(label, {})[key] = value * math.exp(float(np.float32(score)) / tau) / total
    return votes


def random_row(rng: np.random.Generator, b: int, labels: int) -> list:
    """b hits over `labels` labels: those below `labels` are labels' keys. Many scores are equal."""
    scores = -np.sort(-rng.choice([0.9, 0.75, 0.5, -0.25, -1.0], size=b))
    y = random_relevance(rng, b, labels)
    kinds = rng.random(b) < 0.4
    ids = rng.permutation(1000)[:b].tolist()
    row = [
        (key, float(score), bool(kind), [int(rng.integers(labels))] if kind else y[i].indices.tolist())
        for i, (key, score, kind) in enumerate(zip(ids, scores, kinds, strict=True))
    ]
    return sorted(row, key=lambda cell: (-cell[1], cell[0]))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    b=st.integers(1, 25),
    labels=st.integers(1, 12),
    k=st.integers(1, 15),
    lambda_=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    tau=st.sampled_from([0.05, 0.3, 5.0]),
)
def test_labels_scores_and_evidence(seed: int, b: int, labels: int, k: int, lambda_: float, tau: float) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, int(rng.integers(1, b + 1)), labels) for _ in range(3)]
    exclude = random_relevance(rng, 3, labels, 0.2)
    hits = hits_of(rows)
    got = aggregate(hits, lambda_=lambda_, temperature=tau, k=k, exclude=exclude)
    evidence = vote_evidence(hits, got, lambda_=lambda_, temperature=tau, keys=3)
    for i, row in enumerate(rows):
        votes = dense(row, lambda_, tau)
        allowed = {label for label in votes if not exclude[i, label]}
        found = got.labels_Bk[i][got.labels_Bk[i] >= 0].tolist()
        scores = got.scores_Bk[i][: len(found)]
        assert len(found) == min(k, len(allowed)), "no label that nothing votes for"
        assert set(found) <= allowed
        assert (got.labels_Bk[i][len(found) :] == -1).all()
        assert (got.scores_Bk[i][len(found) :] == 0).all()
        expected = {label: sum(votes[label].values()) for label in allowed}
        assert scores == pytest.approx([expected[label] for label in found], rel=1e-5)
        order = list(zip((-scores).tolist(), found, strict=True))
        assert order == sorted(order)
        left = [expected[label] for label in allowed - set(found)]
        assert not left or max(left) <= scores[-1] * (1 + 1e-5)
        for rank, label in enumerate(found):
            part = slice(*evidence.offsets[i * k + rank : i * k + rank + 2])
            keys, shares = evidence.key_ids[part].tolist(), evidence.shares[part]
            assert len(keys) == min(3, len(votes[label]))
            assert shares == pytest.approx([votes[label][key] / expected[label] for key in keys], rel=1e-5)
            assert (np.diff(shares) <= 0).all(), "the largest share first"
            similarity = {key: score for key, score, _, _ in row}
            assert evidence.similarities[part].tolist() == [np.float32(similarity[key]) for key in keys]


def test_equal_scores_are_ordered_by_label_and_evidence_by_key() -> None:
    hits = hits_of([[(3, 0.5, False, [7, 2]), (5, 0.5, False, [2, 7, 4]), (9, 0.5, False, [4])]])
    got = aggregate(hits, lambda_=1.0, temperature=0.1, k=3)
    assert got.labels_Bk.tolist() == [[2, 4, 7]]
    assert len(set(got.scores_Bk[0].tolist())) == 1
    evidence = vote_evidence(hits, got, lambda_=1.0, temperature=0.1, keys=5)
    assert evidence.key_ids.tolist() == [3, 5, 5, 9, 3, 5]
    assert evidence.shares.tolist() == [0.5] * 6


def test_lambda_zero_is_the_labels_alone_and_one_the_instances() -> None:
    hits = hits_of([[(0, 0.9, False, [0]), (11, 0.8, True, [1]), (10, 0.1, True, [0])]])
    assert aggregate(hits, lambda_=0.0, temperature=0.1, k=3).labels_Bk.tolist() == [[1, 0, -1]]
    assert aggregate(hits, lambda_=1.0, temperature=0.1, k=3).labels_Bk.tolist() == [[0, -1, -1]]
    assert aggregate(hits, lambda_=0.5, temperature=0.1, k=1).labels_Bk.tolist() == [[0]]


def test_excluded_pairs_make_room_for_the_next() -> None:
    hits = hits_of([[(10, 0.9, True, [0]), (11, 0.8, True, [1]), (12, 0.7, True, [2])]] * 2)
    exclude = sp.csr_matrix(np.array([[1, 0, 0], [0, 1, 0]], np.float32))
    got = aggregate(hits, lambda_=0.5, temperature=0.1, k=2, exclude=exclude)
    assert got.labels_Bk.tolist() == [[1, 2], [0, 2]]


def test_labels_beyond_what_32_bits_hold_beside_a_place() -> None:
    """Votes are packed into 32 bits where they fit, else into 64: the answers are the same."""
    rows = [random_row(np.random.default_rng(seed), 25, 12) for seed in range(40)]
    exclude = random_relevance(np.random.default_rng(9), 40, 12, 0.2)
    last = np.iinfo(np.int32).max - 11
    near, far = hits_of(rows), hits_of([[(*cell, [last + v for v in votes]) for *cell, votes in row] for row in rows])
    shape = (40, last + 12)
    moved = sp.csr_matrix((exclude.data, exclude.indices.astype(np.int64) + last, exclude.indptr), shape=shape)
    expected = aggregate(near, lambda_=0.5, temperature=0.3, k=9, exclude=exclude)
    got = aggregate(far, lambda_=0.5, temperature=0.3, k=9, exclude=moved)
    assert got.scores_Bk.tolist() == expected.scores_Bk.tolist()
    labels = expected.labels_Bk
    assert got.labels_Bk.tolist() == np.where(labels >= 0, labels + last, -1).tolist()


def test_hits_that_vote_for_nothing_leave_an_empty_answer() -> None:
    got = aggregate(hits_of([[(0, 0.9, False, [])], [(10, 0.9, True, [4])]]), lambda_=0.5, temperature=0.1, k=2)
    assert got.labels_Bk.tolist() == [[-1, -1], [4, -1]]
    evidence = vote_evidence(
        hits_of([[(0, 0.9, False, [])]]),
        aggregate(hits_of([[(0, 0.9, False, [])]]), lambda_=0.5, temperature=0.1, k=2),
        lambda_=0.5,
        temperature=0.1,
        keys=2,
    )
    assert evidence.offsets.tolist() == [0, 0, 0]


def test_a_sharp_softmax_does_not_overflow() -> None:
    hits = hits_of([[(10, 1.0, True, [0]), (11, -1.0, True, [1])]])
    got = aggregate(hits, lambda_=0.0, temperature=1e-3, k=1)
    assert got.labels_Bk.tolist() == [[0]]
    assert got.scores_Bk.tolist() == [[1.0]]


def test_no_label_is_answered_with_a_score_or_a_share_of_nothing() -> None:
    """A vote of e^-200 is something in float64, in which votes are added up, and nothing in float32."""
    hits = hits_of([[(10, 1.0, True, [0]), (11, 0.8, True, [1]), (12, 0.8, False, [0, 2])]])
    got = aggregate(hits, lambda_=0.5, temperature=1e-3, k=3)
    assert got.labels_Bk.tolist() == [[0, -1, -1]]
    evidence = vote_evidence(hits, got, lambda_=0.5, temperature=1e-3, keys=5)
    assert (evidence.key_ids.tolist(), evidence.shares.tolist()) == ([10], [1.0])
    assert evidence.offsets.tolist() == [0, 1, 1, 1]


def test_a_key_with_very_many_labels_does_not_make_all_rows_as_wide() -> None:
    rng, labels = np.random.default_rng(0), 200_000
    rows = [[(i, 0.5 - 0.1 * i, False, rng.choice(labels, 3, replace=False).tolist()) for i in range(4)]] * 200
    rows[77] = [(9, 0.9, False, rng.permutation(labels).tolist()), (10, 0.8, True, [5])]
    hits = hits_of(rows)
    exclude = sp.csr_matrix(([1.0], ([78], [rows[0][0][3][0]])), shape=(200, labels))
    settings = {"lambda_": 0.5, "temperature": 0.1, "k": 5, "blocked": np.array([7])}
    tracemalloc.start()
    found = aggregate(hits, exclude=exclude, **settings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 * labels * 8, "one number for each cell of the padded rows would be more"
    for row in range(len(rows)):
        alone = aggregate(hits.rows(row, row + 1), exclude=exclude[row : row + 1], **settings)
        assert found.labels_Bk[row].tolist() == alone.labels_Bk[0].tolist()
        assert found.scores_Bk[row].tolist() == alone.scores_Bk[0].tolist()
