"""A published memory, opened from disk, finds what plain NumPy finds, to the bit, however it is sharded."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import flat_index, publish_keys, random_relevance, tied_rows, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from raexmc_ray.memory.hits import Hits, SnapshotMismatchError, merge_hits
from raexmc_ray.memory.shard import LocalShards, Shard
from raexmc_ray.predict import aggregate
from raexmc_ray.recipe import Neighbours


def reference(queries: np.ndarray, keys: np.ndarray, allowed: list[tuple[int, int, int]]) -> list[list[tuple]]:
    """For each query its (score, key id), of the best b of the keys start..stop−1 for each (b, start, stop)."""
    answers = []
    for scores in (queries.astype(np.float64) @ keys.astype(np.float64).T).astype(np.float32):
        found = []
        for b, start, stop in allowed:
            found += sorted((-float(scores[i]), i) for i in range(start, stop))[:b]
        answers.append([(-score, i) for score, i in sorted(found)])
    return answers


def listed(hits: Hits) -> list[list[tuple]]:
    """(score, key id) of every hit, padding left out; padding stands at the end."""
    found = hits.key_ids_Bb >= 0
    assert (np.diff(found.astype(int), axis=1) <= 0).all(), "padding is at the end"
    assert (hits.scores_Bb[~found] == -np.inf).all()
    return [
        list(zip(scores[mine].tolist(), ids[mine].tolist(), strict=True))
        for scores, ids, mine in zip(hits.scores_Bb, hits.key_ids_Bb, found, strict=True)
    ]


def votes_of(hits: Hits) -> list[list[int]]:
    return [
        hits.votes[start:stop].tolist()
        for start, stop in zip(hits.vote_offsets[:-1], hits.vote_offsets[1:], strict=True)
    ]


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    instances=st.integers(1, 40),
    labels=st.integers(1, 12),
    b=st.integers(1, 60),
    ties=st.booleans(),
    cut=st.integers(0, 6),
)
def test_any_number_of_shards_any_batch(seed: int, instances: int, labels: int, b: int, ties: bool, cut: int) -> None:
    rng = np.random.default_rng(seed)
    total = instances + labels
    keys = tied_rows(rng, total) if ties else unit_rows(rng, total, 24)
    keys[rng.integers(total, size=total // 3)] = keys[-1]  # the same key again and again
    queries = np.concatenate([tied_rows(rng, 4) if ties else unit_rows(rng, 4, 24), keys[-2:]])
    relevance = random_relevance(rng, instances, labels)
    lists = [*relevance.tolil().rows.tolist(), *[[label] for label in range(labels)]]
    modes = {
        Neighbours(joint=b): [(b, 0, total)],
        Neighbours(instances=b, labels=2): [(b, 0, instances), (2, instances, total)],
        Neighbours(instances=0, labels=b): [(b, instances, total)],
    }
    with tempfile.TemporaryDirectory() as folder:
        for shards in (1, 2, 3, 7):
            memory = LocalShards(publish_keys(Path(folder) / str(shards), keys, relevance, shards))
            for neighbours, allowed in modes.items():
                hits = memory.search(queries, neighbours)
                assert listed(hits) == reference(queries, keys, allowed)
                width = neighbours.joint or (neighbours.instances or 0) + (neighbours.labels or 0)
                assert hits.key_ids_Bb.shape == (len(queries), width), "whatever the shards"
                ids = hits.key_ids_Bb.ravel()
                assert votes_of(hits) == [lists[key] if key >= 0 else [] for key in ids.tolist()]
                assert np.array_equal(hits.is_label_Bb.ravel(), ids >= instances)
                parts = [memory.search(part, neighbours) for part in (queries[:cut], queries[cut:])]
                assert [row for part in parts for row in listed(part)] == listed(hits), "whatever the batch"


def test_scores_are_exact_at_a_real_size() -> None:
    rng = np.random.default_rng(0)
    keys, queries = unit_rows(rng, 3000, 384), unit_rows(rng, 40, 384)
    keys[1500:] = keys[rng.permutation(1500)]  # every key twice
    exact = (queries.astype(np.float64) @ keys.astype(np.float64).T).astype(np.float32)
    order = np.lexsort((np.broadcast_to(np.arange(3000), exact.shape), -exact))[:, :100]
    positions, scores = flat_index(keys).search(queries, 100, 0, 3000)
    assert np.array_equal(scores, np.take_along_axis(exact, order, 1))
    assert np.array_equal(positions, order)


def test_more_shards_than_keys(tmp_path: Path) -> None:
    keys = np.eye(3, 4, dtype=np.float32)
    relevance = random_relevance(np.random.default_rng(0), 2, 1, 1.0)
    memory = LocalShards(publish_keys(tmp_path, keys, relevance, 5))
    assert listed(memory.search(keys[1:2], Neighbours(joint=9))) == [[(1.0, 1), (0.0, 0), (0.0, 2)]]
    assert memory.keys(np.array([2, 0])) == {
        0: {"kind": "instance", "uid": "x0", "text": "text 0"},
        2: {"kind": "label", "uid": "z0", "text": "label 0"},
    }


@pytest.mark.parametrize("shards", [1, 3])
def test_no_query_no_hit(tmp_path: Path, shards: int) -> None:
    keys = unit_rows(np.random.default_rng(0), 6, 4)
    memory = LocalShards(publish_keys(tmp_path, keys, random_relevance(np.random.default_rng(0), 4, 2), shards))
    for neighbours in (Neighbours(joint=3), Neighbours(instances=2, labels=1)):
        hits = memory.search(keys[:0], neighbours)
        assert hits.key_ids_Bb.shape == (0, 3)
        assert aggregate(hits, lambda_=0.5, temperature=0.1, k=2).labels_Bk.shape == (0, 2)


@pytest.mark.parametrize("wanted", [[], [5], [0, 1], [1, 2, 3, 4, 18, 19], [19, 20, 21, 30], [7, 7, 0]])
def test_a_shard_gives_each_of_its_keys_once(tmp_path: Path, wanted: list[int]) -> None:
    keys = unit_rows(np.random.default_rng(0), 20, 4)
    snapshot = publish_keys(tmp_path, keys, random_relevance(np.random.default_rng(0), 15, 5), 3)
    for shard in range(3):
        table = Shard(snapshot, shard).keys(np.array(wanted, np.int64))
        assert table["key_id"].to_pylist() == sorted({i for i in wanted if i < 20 and i % 3 == shard})


def test_answers_of_two_snapshots_are_never_merged(tmp_path: Path) -> None:
    keys = unit_rows(np.random.default_rng(0), 6, 4)
    relevance = random_relevance(np.random.default_rng(0), 4, 2)
    parts = [
        Shard(publish_keys(tmp_path, keys, relevance, 2, name), shard).search(keys, Neighbours(joint=3))
        for shard, name in enumerate(("old", "new"))
    ]
    with pytest.raises(SnapshotMismatchError, match=r"2 snapshots.*new.*old"):
        merge_hits(parts, Neighbours(joint=3))
