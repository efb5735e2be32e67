"""The loss is the formula of objective.py, term by term, whether taken at once or in blocks of queries."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raexmc_ray.objective import Masks, PairMask, contrastive_loss, loss_and_gradients
from raexmc_ray.recipe import TrainingSection
from raexmc_ray.train.sampler import Pairs
from raexmc_ray.train.step import learning_rate


def unit(rng: np.random.Generator, rows: int, d: int = 5) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(rows, d))), dim=1)


def naive(q, z, x, y, positive, share, own, tau, decoupled, votes):
    """The formula in plain loops; `share[i, j]`: y_i and y_j meet."""
    total = 0.0
    for i in range(len(q)):
        s = lambda v: float(q[i] @ v) / tau  # noqa: B023, E731
        instances = range(len(x) if x is not None else 0)
        terms = []
        wrong = [s(z[label]) for label in range(len(z)) if not decoupled or not y[i, label]]
        wrong += [s(x[j]) for j in instances if j != own[i] and (not decoupled or not share[i, j])]
        for p in np.flatnonzero(positive[i]):
            mass = np.exp(s(z[p])) + sum(np.exp(s(x[j])) for j in instances if j != own[i] and votes and votes[p][j])
            # Decoupled, a positive joins the wrong ones; the plain softmax has all of them in its sum anyway.
            terms.append(-np.log(mass) + np.log(np.exp(wrong).sum() + (mass if decoupled else 0)))
        total += np.mean(terms)
    return total / len(q)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.5]),
)
def test_loss_equals_the_formula(
    seed: int, B: int, C: int, decoupled: bool, instances: bool, in_batch: bool, voting: bool
) -> None:
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
    has = rng.random((C, B + 3)) < 0.4
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
        votes_CN=torch.from_numpy(has.astype(float)).to_sparse() if voting else None,
    )
    assert loss.mean().item() == pytest.approx(
        naive(q, z, x, y, positive, share, own, 0.3, decoupled, has.tolist() if voting else None), rel=1e-9
    )


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
    loss.sum().backward()
    assert loss.tolist() == [0]
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()


def test_a_label_far_from_its_instance_that_nobody_votes_for_is_learned_all_the_same() -> None:
    """Its similarity is less than e⁻⁸⁷, float32's least, of the nearest instance's."""
    q = torch.tensor([[1.0, 0.0]], requires_grad=True)
    z = torch.tensor([[0.05, (1 - 0.05**2) ** 0.5]])
    x = torch.tensor([[1.0, 0.0], [0.95, (1 - 0.95**2) ** 0.5]])
    none = torch.zeros(1, 2, dtype=torch.bool)
    losses = [
        contrastive_loss(
            q,
            z,
            x,
            positive_BC=torch.ones(1, 1, dtype=torch.bool),
            known_BC=torch.ones(1, 1, dtype=torch.bool),
            shared_BN=none,
            own_B=torch.zeros(1, dtype=torch.long),
            temperature=0.005,
            votes_CN=votes,
        )
        for votes in (None, torch.zeros(1, 2).to_sparse())
    ]
    assert losses[0].item() == pytest.approx(0.9 / 0.005)
    assert losses[1].item() == losses[0].item()
    gradients = [torch.autograd.grad(loss.sum(), q)[0] for loss in losses]
    torch.testing.assert_close(gradients[1], gradients[0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 6), st.booleans(), st.integers(1, 40))
def test_in_blocks_it_is_the_same_loss_with_the_same_gradients(
    seed: int, B: int, C: int, instances: bool, cells: int
) -> None:
    rng = np.random.default_rng(seed)
    q, z = unit(rng, B), unit(rng, C)
    x = torch.cat([unit(rng, 2), q]) if instances else None
    positive, known = rng.random((B, C)) < 0.3, rng.random((B, C)) < 0.3
    positive[np.arange(B), rng.integers(C, size=B)] = True
    shared = rng.random((B, B + 2)) < 0.3

    def mask(dense: np.ndarray) -> PairMask:
        pairs = Pairs.of(sp.csr_matrix(dense))
        return PairMask(torch.from_numpy(pairs.offsets), torch.from_numpy(pairs.columns))

    masks = Masks(mask(positive), mask(known), mask(shared), torch.arange(2, B + 2))
    with mock.patch.multiple("raexmc_ray.objective", BLOCK_CELLS=cells, BLOCK_QUERIES=1):
        loss, gradients = loss_and_gradients(q, z, x, masks, temperature=0.2)
    arrays = [a.clone().requires_grad_() for a in (q, z, x) if a is not None]
    expected = contrastive_loss(
        arrays[0],
        arrays[1],
        arrays[2] if instances else None,
        positive_BC=torch.from_numpy(positive),
        known_BC=torch.from_numpy(known),
        shared_BN=torch.from_numpy(shared) if instances else None,
        own_B=torch.arange(2, B + 2),
        temperature=0.2,
    ).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for array, gradient in zip(arrays, gradients, strict=False):
        torch.testing.assert_close(gradient, array.grad)


def test_however_many_keys_a_block_has_queries_enough_to_be_worth_reading_them() -> None:
    rng = np.random.default_rng(0)
    q, z = unit(rng, 130), unit(rng, 50_000)
    pairs = PairMask(torch.arange(131), torch.from_numpy(rng.integers(50_000, size=130)))
    masks = Masks(pairs, pairs, pairs, torch.arange(130))
    with mock.patch("raexmc_ray.objective.contrastive_loss", wraps=contrastive_loss) as blocks:
        loss_and_gradients(q, z, None, masks, temperature=0.2)
    assert [len(call.args[0]) for call in blocks.call_args_list] == [64, 64, 2]


def test_learning_rate_rises_then_falls_to_zero() -> None:
    section = TrainingSection(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(section, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates[-1] < 0.02
    assert rates[10:] == sorted(rates[10:], reverse=True)
    for warmup, steps in ((0.0, 1), (0.1, 12), (0.5, 10), (0.9, 10)):
        section = TrainingSection(learning_rate=1.0, warmup=warmup)
        assert max(learning_rate(section, step, steps) for step in range(steps)) <= 1.0
