"""Sharding is invisible: labels and scores are those of plain NumPy, for any number of shards, ties included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import flat_index
from hypothesis import given, settings
from hypothesis import strategies as st

from raexmc_ray.memory.hits import Hits, SnapshotMismatchError, merge_hits, search_all
from raexmc_ray.memory.index import SLACK
from raexmc_ray.predict import aggregate, vote_evidence
from raexmc_ray.ragged import ragged_take
from raexmc_ray.recipe import Neighbours


def unit(rng: np.random.Generator, rows: int, d: int) -> np.ndarray:
    vectors = rng.normal(size=(rows, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def tied(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Vectors of ±1/2 in four dimensions: sixteen at most, so that nearly every score is a tie."""
    return rng.choice(np.array([-0.5, 0.5], np.float32), size=(rows, 4))


def reference(queries: np.ndarray, keys: np.ndarray, ids: np.ndarray, b: int) -> tuple[np.ndarray, np.ndarray]:
    """(key ids, scores) of the best b in plain NumPy, padded with −1 and −∞."""
    scores = (queries.astype(np.float64) @ keys.astype(np.float64).T).astype(np.float32)
    order = np.lexsort((np.broadcast_to(ids, scores.shape), -scores))[:, :b]
    pad = ((0, 0), (0, b - order.shape[1]))
    found = np.take_along_axis(scores, order, 1)
    return np.pad(ids[order], pad, constant_values=-1), np.pad(found, pad, constant_values=-np.inf)


class World:
    """Keys with values, cut into shards by `key id % shards`."""

    def __init__(self, keys: np.ndarray, instances: int, labels: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.keys, self.instances, self.labels = keys, instances, labels
        self.relevance = sp.csr_matrix((rng.random((instances, labels)) < 0.3).astype(np.float32))
        self.values = sp.csr_matrix(sp.vstack([self.relevance, sp.eye_array(labels, dtype=np.float32)]))

    def search(self, queries: np.ndarray, neighbours: Neighbours, shards: int) -> Hits:
        self.asked = 0

        def ask(rows: Any, asked: Neighbours) -> list[Hits]:
            self.asked += 1
            parts = []
            for shard in range(shards):
                ids = np.arange(shard, len(self.keys), shards)
                if not len(ids):
                    continue
                index, cut = flat_index(self.keys[ids]), int(np.searchsorted(ids, self.instances))
                ranges = (
                    [(asked.joint, 0, len(ids))]
                    if asked.joint is not None
                    else [(asked.instances or 0, 0, cut), (asked.labels or 0, cut, len(ids))]
                )
                for b, start, stop in ranges:
                    positions, scores = index.search(queries[rows], b, start, stop)
                    found = ids[positions]
                    votes, offsets = ragged_take(self.values.indices, self.values.indptr, found.ravel())
                    parts.append(Hits(found, scores, found >= self.instances, votes, offsets, "s"))
            return parts

        return search_all(ask, neighbours, shards)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    instances=st.integers(1, 60),
    labels=st.integers(1, 40),
    b=st.integers(1, 120),
    shards=st.integers(1, 9),
    ties=st.booleans(),
    crowded=st.booleans(),
)
def test_hits_are_numpys_to_the_bit(
    seed: int, instances: int, labels: int, b: int, shards: int, ties: bool, crowded: bool
) -> None:
    rng = np.random.default_rng(seed)
    keys = tied(rng, instances + labels) if ties else unit(rng, instances + labels, 8)
    if crowded:  # all keys that are near lie in one shard
        keys[::shards] = keys[0] + rng.normal(scale=0.05, size=keys[::shards].shape)
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    keys[rng.integers(len(keys), size=len(keys) // 3)] = keys[0]
    queries = np.concatenate([tied(rng, 3) if ties else unit(rng, 3, 8), keys[:2]])
    world = World(keys, instances, labels, seed)
    hits = world.search(queries, Neighbours(joint=b), shards)
    ids, scores = reference(queries, keys, np.arange(len(keys)), b)
    assert np.array_equal(hits.key_ids_Bb, ids)
    assert np.array_equal(hits.scores_Bb, scores)
    for row, query in enumerate(queries):
        alone = world.search(query[None], Neighbours(joint=b), shards)
        assert np.array_equal(alone.scores_Bb[0], hits.scores_Bb[row]), "whatever the batch"
        assert np.array_equal(alone.key_ids_Bb[0], hits.key_ids_Bb[row])

    apart = world.search(queries, Neighbours(instances=b, labels=3), shards)
    for kind, start, stop, limit in ((False, 0, instances, b), (True, instances, len(keys), 3)):
        ids, _ = reference(queries, keys[start:stop], np.arange(start, stop), limit)
        got = [
            row[(row >= 0) & (is_label == kind)]
            for row, is_label in zip(apart.key_ids_Bb, apart.is_label_Bb, strict=True)
        ]
        for mine, wanted in zip(got, ids, strict=True):
            assert np.array_equal(mine, wanted[wanted >= 0])
    assert (np.diff(np.where(apart.key_ids_Bb >= 0, apart.scores_Bb, -2), axis=1) <= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    b=st.integers(1, 80),
    shards=st.integers(1, 7),
    k=st.integers(1, 20),
    lambda_=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    ties=st.booleans(),
)
def test_predictions_are_the_dense_formulas(seed: int, b: int, shards: int, k: int, lambda_: float, ties: bool) -> None:
    instances, labels, tau = 40, 12, 0.2
    rng = np.random.default_rng(seed)
    keys = tied(rng, instances + labels) if ties else unit(rng, instances + labels, 8)
    queries = tied(rng, 4) if ties else unit(rng, 4, 8)
    world = World(keys, instances, labels, seed)
    exclude = sp.csr_matrix((rng.random((4, labels)) < 0.2).astype(np.float32))
    hits = world.search(queries, Neighbours(joint=b), shards)
    predictions = aggregate(hits, lambda_=lambda_, temperature=tau, k=k, exclude=exclude)

    values = sp.vstack([lambda_ * world.relevance, (1 - lambda_) * sp.eye_array(labels)]).toarray()
    ids, scores = reference(queries, keys, np.arange(len(keys)), b)
    for row in range(4):
        kept = ids[row] >= 0
        s = scores[row][kept].astype(np.float64) / tau
        weights = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
        dense = weights @ values[ids[row][kept]]
        got = predictions.labels_Bk[row]
        got = got[got >= 0]
        allowed = (dense > 0) & (exclude[row].toarray()[0] == 0)
        assert len(got) == min(k, allowed.sum())
        assert len(set(got)) == len(got)
        assert np.allclose(predictions.scores_Bk[row][: len(got)], dense[got], rtol=1e-5)
        rest = np.setdiff1d(np.flatnonzero(allowed), got)
        if len(rest) and len(got):
            assert dense[rest].max() <= dense[got].min() * (1 + 1e-6)
        pairs = list(zip(-predictions.scores_Bk[row][: len(got)], got, strict=True))
        assert pairs == sorted(pairs), "score descending, label ascending"

    single = aggregate(
        world.search(queries, Neighbours(joint=b), 1), lambda_=lambda_, temperature=tau, k=k, exclude=exclude
    )
    assert np.array_equal(single.labels_Bk, predictions.labels_Bk)
    assert np.array_equal(single.scores_Bk, predictions.scores_Bk), "to the bit, whatever the shards"

    evidence = vote_evidence(hits, predictions, lambda_=lambda_, temperature=tau, keys=1000)
    for cell, label in enumerate(predictions.labels_Bk.ravel()):
        part = slice(evidence.offsets[cell], evidence.offsets[cell + 1])
        assert (label >= 0) == (part.stop > part.start)
        if label >= 0:
            assert evidence.shares[part].sum() == pytest.approx(1, abs=1e-5)
            assert (np.diff(evidence.shares[part]) <= 0).all()
            assert (values[evidence.key_ids[part], label] > 0).all(), "only keys that vote for the label"


def test_a_shard_that_has_more_than_its_share_is_asked_again() -> None:
    rng = np.random.default_rng(0)
    keys = unit(rng, 400, 8)
    keys[::4] = keys[0]
    world, queries = World(keys, 300, 100, 0), np.concatenate([keys[:1], unit(rng, 5, 8)])
    hits = world.search(queries, Neighbours(joint=60), 4)
    assert world.asked == 2
    assert np.array_equal(hits.key_ids_Bb, reference(queries, keys, np.arange(400), 60)[0])
    votes, offsets = ragged_take(world.values.indices, world.values.indptr, hits.key_ids_Bb.ravel())
    assert np.array_equal(hits.votes, votes)
    assert np.array_equal(hits.vote_offsets, offsets)
    world.search(queries[1:], Neighbours(joint=60), 4)
    assert world.asked == 1, "the usual case"


def test_more_ties_than_the_first_search_sees() -> None:
    keys = np.tile(np.eye(4, dtype=np.float32)[:1], (20 * SLACK, 1))
    positions, scores = flat_index(keys).search(keys[:1], 3, 0, len(keys))
    assert positions.tolist() == [[0, 1, 2]]
    assert scores.tolist() == [[1, 1, 1]]


def test_two_snapshots_are_never_merged() -> None:
    empty = np.empty((1, 0), np.int64)
    parts = [
        Hits(empty, empty.astype(np.float32), empty > 0, np.empty(0, np.int32), np.zeros(1, np.int64), name)
        for name in ("one", "two")
    ]
    with pytest.raises(SnapshotMismatchError, match=r"one.*two"):
        merge_hits(parts, Neighbours(joint=1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, 5.0])
def test_keys_and_queries_must_be_of_unit_length(bad: float) -> None:
    keys = np.eye(3, dtype=np.float32)
    broken = keys.copy()
    broken[1] = bad
    with pytest.raises(ValueError, match="row 1"):
        flat_index(broken)
    with pytest.raises(ValueError, match="row 1"):
        flat_index(keys).search(broken, 1, 0, 3)


@pytest.mark.parametrize(("lambda_", "temperature"), [(-0.1, 1.0), (1.1, 1.0), (0.5, 0.0), (0.5, float("nan"))])
def test_settings_out_of_range_are_refused(lambda_: float, temperature: float) -> None:
    world = World(np.eye(4, dtype=np.float32), 2, 2, 0)
    hits = world.search(np.eye(4, dtype=np.float32)[:1], Neighbours(joint=2), 1)
    with pytest.raises(ValueError, match=r"lambda|temperature"):
        aggregate(hits, lambda_=lambda_, temperature=temperature, k=1)
