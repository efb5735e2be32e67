"""Embeddings of all ranks, with gradients: every rank's batch is every other rank's negatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _AllGather(torch.autograd.Function):
    """Concatenates equal parts of all ranks; the gradient of a part is the sum of what all ranks found."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        parts = part.new_empty(dist.get_world_size() * len(part), *part.shape[1:])
        dist.all_gather_into_tensor(parts, part.contiguous())
        return parts

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gradient,) = gradients
        part = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(part, gradient.contiguous())
        return part


def gather_with_gradient(part: torch.Tensor) -> torch.Tensor:
    """[ranks · n, …] from each rank's [n, …], in rank order; the same n on all ranks. Alone: `part` itself."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return part
    return _AllGather.apply(part)  # type: ignore[no-untyped-call]
