"""The contrastive loss over the in-batch memory (METHOD.md, Training objective).

For query i with positive label p, similarities s divided by the temperature τ:

    L_ip = −s(x_i,z_p) + log( e^{s(x_i,z_p)} + Σ_{l: y_il=0} e^{s(x_i,z_l)} + Σ_{j≠i, y_i∩y_j=∅} e^{s(x_i,x_j)} )

The loss is the mean over i of the mean over its positives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
) -> torch.Tensor:
    """The loss of B queries against C labels and N instances: a scalar, differentiable in all embeddings.

    queries_BD, labels_CD, instances_ND: float, of unit length. No instances: the plain dual encoder.
    positive_BC: bool; the positives that count. Each query has one or more.
    known_BC: bool; every label known to fit the query in the full training relevance: no negative.
    shared_BN: bool; instances that share a label with the query: neither positive nor negative.
    own_B: int64; the place of each query among the instances: its own key is masked.
    decoupled: False gives the plain softmax (InfoNCE), in whose denominator every label and every other
        instance stands.
    """
    B, C = len(queries_BD), len(labels_CD)
    if positive_BC.shape != (B, C) or known_BC.shape != (B, C):
        raise ValueError(f"positives and known labels must be {(B, C)}")
    to_labels_BC = queries_BD @ labels_CD.T / temperature
    # A finite stand-in for −∞: its exponential is 0 too, but the gradient of an empty sum is 0, not NaN.
    masked = torch.finfo(to_labels_BC.dtype).min / 4
    denominator = [to_labels_BC.masked_fill(known_BC | positive_BC, masked) if decoupled else to_labels_BC]
    if instances_ND is not None:
        if shared_BN is None or shared_BN.shape != (B, len(instances_ND)):
            raise ValueError(f"instances need shared_BN of shape {(B, len(instances_ND))}")
        own_BN = F.one_hot(own_B, len(instances_ND)).bool()
        to_instances_BN = queries_BD @ instances_ND.T / temperature
        denominator.append(to_instances_BN.masked_fill((shared_BN | own_BN) if decoupled else own_BN, masked))
    log_denominator_B1 = torch.logsumexp(torch.cat(denominator, dim=1), dim=1, keepdim=True)
    margin_BC = log_denominator_B1 - to_labels_BC
    # log(e^s + e^n) − s = softplus(n − s). The plain softmax has its positive in the denominator already.
    loss_BC = F.softplus(margin_BC) if decoupled else margin_BC
    positives_B = positive_BC.sum(1)
    return (loss_BC.where(positive_BC, 0.0).sum(1) / positives_B).mean()
