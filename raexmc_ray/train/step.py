"""The loss of one batch on one rank, and the schedule of the learning rate. Free of Ray."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from raexmc_ray.encoder import Tokens
from raexmc_ray.objective import contrastive_loss
from raexmc_ray.recipe import TrainingSection
from raexmc_ray.train.gather import gather_with_gradient
from raexmc_ray.train.sampler import Batch


def batch_loss(
    tower: nn.Module,
    batch: Batch,
    instance_tokens: Tokens,
    label_tokens: Tokens,
    settings: TrainingSection,
    rank: int = 0,
    ranks: int = 1,
) -> torch.Tensor:
    """The loss of this rank's rows against the labels and instances of all ranks: a scalar.

    `tower` maps (tokens, chunk size) to embeddings: a TextEncoder, or DistributedDataParallel around one.
    The mean over the ranks of what this returns is the loss of the whole batch. Each rank encodes an equal
    part of the rows and of the distinct labels, in one call; the last labels are repeated to fill up the last
    rank's part, and dropped after gathering.
    """
    per_rank = len(batch.rows_B) // ranks
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    labels_per_rank = -(-len(batch.labels_C) // ranks)
    places = np.arange(rank * labels_per_rank, (rank + 1) * labels_per_rank)
    labels = batch.labels_C[np.minimum(places, len(batch.labels_C) - 1)]
    tokens = concatenate(instance_tokens.take(batch.rows_B[mine]), label_tokens.take(labels))
    embeddings = tower(tokens, settings.chunk_size)
    queries_BD, part_CD = embeddings[:per_rank], embeddings[per_rank:]
    labels_CD = gather_with_gradient(part_CD)[: len(batch.labels_C)]
    objective = settings.objective
    with_instances = objective.instances == "in_batch"
    device = embeddings.device
    positive_BC = batch.drawn_BC if objective.positives == "drawn" else batch.known_BC
    return contrastive_loss(
        queries_BD,
        labels_CD,
        gather_with_gradient(queries_BD) if with_instances else None,
        positive_BC=torch.from_numpy(positive_BC[mine]).to(device),
        known_BC=torch.from_numpy(batch.known_BC[mine]).to(device),
        shared_BN=torch.from_numpy(batch.shared_BB[mine]).to(device) if with_instances else None,
        own_B=torch.arange(mine.start, mine.stop, device=device),
        temperature=settings.temperature,
        decoupled=objective.kind == "decoupled",
    )


def concatenate(first: Tokens, second: Tokens) -> Tokens:
    """The texts of `first`, then those of `second`."""
    return Tokens(
        np.concatenate([first.ids, second.ids]),
        np.concatenate([first.offsets, second.offsets[1:] + first.offsets[-1]]),
    )


def learning_rate(settings: TrainingSection, step: int, steps: int) -> float:
    """Of step `step` (from 0) of `steps`: up linearly over the warm-up, then down linearly to zero."""
    warmup = settings.warmup * steps
    if step + 1 < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * (steps - step) / max(steps - warmup, 1)


def make_optimizer(tower: nn.Module, settings: TrainingSection) -> torch.optim.AdamW:
    """AdamW over the tower's weights; decay on matrices only, not on biases and norms."""
    weights = [p for p in tower.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
