"""What the ranks tell each other: every rank's keys are every other rank's negatives. Alone, each is the identity."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist


def alone() -> bool:
    """Whether there is no other rank."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def gather(part: torch.Tensor) -> torch.Tensor:
    """[ranks · n, …] from each rank's [n, …], in rank order; the same n on all ranks."""
    if alone():
        return part
    parts = part.new_empty(dist.get_world_size() * len(part), *part.shape[1:])
    dist.all_gather_into_tensor(parts, part.contiguous())
    return parts


def exchange(parts: torch.Tensor) -> torch.Tensor:
    """[ranks, …]: at each rank's place what that rank has for this one, from each rank's [ranks, …], which has at each
    rank's place what is for that one."""
    if alone():
        return parts
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous())
    return received


def reduce_scatter(whole: torch.Tensor) -> torch.Tensor:
    """This rank's [n, …] of the sum over the ranks of [ranks · n, …]: what `gather` is in the backward direction."""
    if alone():
        return whole
    part = whole.new_empty(len(whole) // dist.get_world_size(), *whole.shape[1:])
    dist.reduce_scatter_tensor(part, whole.contiguous())
    return part


def sum_over_ranks(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, in place: one message for all of a dtype."""
    if alone():
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat)
        for tensor, summed in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def from_first(tensor: torch.Tensor) -> torch.Tensor:
    """The first rank's `tensor`; the same shape and dtype on all ranks."""
    if not alone():
        dist.broadcast(tensor, 0)
    return tensor
