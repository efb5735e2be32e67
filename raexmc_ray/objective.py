"""The contrastive loss over the in-batch memory (RAE-XMC, arXiv 2502.10615).

For query i with positive label p, similarities s divided by the temperature τ:

    L_ip = −s(x_i,z_p) + log( e^{s(x_i,z_p)} + Σ_{l: y_il=0} e^{s(x_i,z_l)} + Σ_{j≠i, y_i∩y_j=∅} e^{s(x_i,x_j)} )

The loss is the mean over i of the mean over its positives.

Beyond the paper, the instances that share a label with i need not be masked: with `votes`, e^{s(x_i,z_p)} becomes
e^{s(x_i,z_p)} + Σ_{j≠i, y_jp=1} e^{s(x_i,x_j)}, the sum over all keys of the in-batch memory that vote for p. L_ip is
then the negative log-likelihood of p under the prediction itself, with λ = 1/2, its own key left out.

`contrastive_loss` computes it with full masks; `loss_and_gradients` takes the same loss, and its gradients, in
blocks of queries, so that its memory does not grow with the square of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

BLOCK_CELLS = 1 << 21
"""Similarities that `loss_and_gradients` has in memory at once, for each of about a dozen arrays."""
BLOCK_QUERIES = 64
"""Queries that it takes at once at least, beyond BLOCK_CELLS, too: each block reads all keys and adds to all of their
gradients, which with few queries takes longer than the products."""


@dataclass(frozen=True)
class PairMask:
    """A boolean matrix as its true cells: row r has columns[offsets[r] : offsets[r + 1]], int64 on the device;
    offsets int64 on the CPU."""

    offsets: torch.Tensor
    columns: torch.Tensor

    def rows(self, start: int, stop: int, width: int) -> torch.Tensor:
        """bool [stop − start, width]: these rows of the matrix."""
        offsets = self.offsets[start : stop + 1]
        rows = torch.repeat_interleave(torch.arange(stop - start), offsets.diff()).to(self.columns.device)
        mask = torch.zeros(stop - start, width, dtype=torch.bool, device=self.columns.device)
        mask[rows, self.columns[offsets[0] : offsets[-1]]] = True
        return mask


@dataclass(frozen=True)
class Masks:
    """Which keys are what to each query: over the labels C, over the labels C, and over the instances N.

    positive: the positives that count, one or more a query. known: every label known to fit the query in the full
    training relevance. shared: instances that share a label with it. own: int64 [B], its place among the instances.
    votes: sparse float [C, N], 1 where an instance has a label, or None where only labels vote.
    """

    positive: PairMask
    known: PairMask
    shared: PairMask
    own: torch.Tensor
    votes: torch.Tensor | None = None


def loss_and_gradients(
    queries_BD: torch.Tensor,
    labels_CD: torch.Tensor,
    instances_ND: torch.Tensor | None,
    masks: Masks,
    *,
    temperature: float,
    decoupled: bool = True,
    scale: float | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """The sum over the queries of their losses, times `scale`, and its gradients in the three arrays.

    scale: 1/B (the mean) unless given; a rank that has a part of the batch's queries gives one over all of them.
    The queries among the instances are taken for arrays of their own: add the two gradients.
    """
    queries, labels = (array.detach() for array in (queries_BD, labels_CD))
    instances = None if instances_ND is None else instances_ND.detach()
    to_queries = torch.empty_like(queries)
    for keys in (labels, instances):
        if keys is not None:
            keys.requires_grad_()
            keys.grad = torch.zeros_like(keys)
    C, N = len(labels), 0 if instances is None else len(instances)
    rows = max(BLOCK_QUERIES, BLOCK_CELLS // (C + N))
    scale = 1 / len(queries) if scale is None else scale
    total = torch.zeros((), device=queries.device, dtype=queries.dtype)
    for start in range(0, len(queries), rows):
        stop = min(start + rows, len(queries))
        block = queries[start:stop].requires_grad_()
        loss_B = contrastive_loss(
            block,
            labels,
            instances,
            positive_BC=masks.positive.rows(start, stop, C),
            known_BC=masks.known.rows(start, stop, C),
            shared_BN=None if instances is None else masks.shared.rows(start, stop, N),
            own_B=masks.own[start:stop],
            temperature=temperature,
            decoupled=decoupled,
            votes_CN=masks.votes,
        )
        loss = loss_B.sum() * scale
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        assert block.grad is not None
        to_queries[start:stop] = block.grad
        total += loss.detach()
    assert labels.grad is not None
    return total, (to_queries, labels.grad, None if instances is None else instances.grad)


def contrastive_loss(
    queries_BD: torch.Tensor,
    labels_CD: torch.Tensor,
    instances_ND: torch.Tensor | None,
    *,
    positive_BC: torch.Tensor,
    known_BC: torch.Tensor,
    shared_BN: torch.Tensor | None,
    own_B: torch.Tensor,
    temperature: float,
    decoupled: bool = True,
    votes_CN: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of each of B queries against C labels and N instances: [B], differentiable in all embeddings.

    queries_BD, labels_CD, instances_ND: float, of unit length. No instances: the plain dual encoder.
    positive_BC: bool; the positives that count. Each query has one or more.
    known_BC: bool; every label known to fit the query in the full training relevance: no negative.
    shared_BN: bool; instances that share a label with the query: neither positive nor negative.
    own_B: int64; the place of each query among the instances: its own key is masked.
    decoupled: False gives the plain softmax (InfoNCE), in whose denominator every label and every other
        instance stands.
    votes_CN: sparse float, 1 where an instance has a label: its key then counts for that label, too.
    """
    B, C = len(queries_BD), len(labels_CD)
    if positive_BC.shape != (B, C) or known_BC.shape != (B, C):
        raise ValueError(f"positives and known labels must be {(B, C)}")
    to_labels_BC = queries_BD @ labels_CD.T / temperature
    # A finite stand-in for −∞: its exponential is 0 too, but the gradient of an empty sum is 0, not NaN.
    masked = torch.finfo(to_labels_BC.dtype).min / 4
    log_mass_BC = to_labels_BC
    denominator = [to_labels_BC.masked_fill(known_BC | positive_BC, masked) if decoupled else to_labels_BC]
    if instances_ND is not None:
        if shared_BN is None or shared_BN.shape != (B, len(instances_ND)):
            raise ValueError(f"instances need shared_BN of shape {(B, len(instances_ND))}")
        own_BN = F.one_hot(own_B, len(instances_ND)).bool()
        to_instances_BN = queries_BD @ instances_ND.T / temperature
        denominator.append(to_instances_BN.masked_fill((shared_BN | own_BN) if decoupled else own_BN, masked))
        if votes_CN is not None:
            to_others_BN = to_instances_BN.masked_fill(own_BN, masked)
            log_mass_BC = torch.logaddexp(to_labels_BC, _log_votes(to_others_BN, votes_CN))
    log_denominator_B1 = torch.logsumexp(torch.cat(denominator, dim=1), dim=1, keepdim=True)
    margin_BC = log_denominator_B1 - log_mass_BC
    # log(e^s + e^n) − s = softplus(n − s). The plain softmax has its positive in the denominator already.
    loss_BC = F.softplus(margin_BC) if decoupled else margin_BC
    return loss_BC.where(positive_BC, 0.0).sum(1) / positive_BC.sum(1)


def _log_votes(to_instances_BN: torch.Tensor, votes_CN: torch.Tensor) -> torch.Tensor:
    """[B, C]: log of the sum of e^similarity over the instances that have each label; a finite stand-in for −∞ where
    there is none, or all of them are e⁻⁸⁷ of the nearest instance's."""
    highest_B1 = to_instances_BN.detach().amax(1, keepdim=True)
    voted_BC = torch.sparse.mm(votes_CN, torch.exp(to_instances_BN - highest_B1).T).T
    numbers = torch.finfo(voted_BC.dtype)
    logs_BC = torch.log(voted_BC.clamp(min=numbers.tiny)) + highest_B1
    return torch.where(voted_BC > numbers.tiny, logs_BC, numbers.min / 4)
