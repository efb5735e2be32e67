"""What the ranks tell each other: every rank's keys are every other rank's negatives. Alone, each is the identity.

Where a worker fails, Ray Train takes the group away from the others while they still train. So each function knows how
many ranks there are, and raises RuntimeError where their group is gone: as the identity it would go on with a part.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist


def is_torn(ranks: int) -> bool:
    """Whether the group of so many ranks is gone."""
    return ranks > 1 and not dist.is_initialized()


def alone(ranks: int) -> bool:
    """Whether there is no other rank. Raises RuntimeError where there are others, and their group is gone."""
    if is_torn(ranks):
        raise RuntimeError("the group of the workers is gone, as after another worker's failure")
    return ranks == 1


def gather(part: torch.Tensor, ranks: int) -> torch.Tensor:
    """[ranks · n, …] from each rank's [n, …], in rank order; the same n on all ranks."""
    if alone(ranks):
        return part
    parts = part.new_empty(ranks * len(part), *part.shape[1:])
    dist.all_gather_into_tensor(parts, part.contiguous())
    return parts


def exchange(parts: torch.Tensor) -> torch.Tensor:
    """[ranks, …]: at each rank's place what that rank has for this one, from each rank's [ranks, …], which has at each
    rank's place what is for that one."""
    if alone(len(parts)):
        return parts
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous())
    return received


def reduce_scatter(whole: torch.Tensor, ranks: int) -> torch.Tensor:
    """This rank's [n, …] of the sum over the ranks of [ranks · n, …]: what `gather` is in the backward direction."""
    if alone(ranks):
        return whole
    part = whole.new_empty(len(whole) // ranks, *whole.shape[1:])
    dist.reduce_scatter_tensor(part, whole.contiguous())
    return part


def sum_over_ranks(tensors: Iterable[torch.Tensor], ranks: int) -> None:
    """Replace each tensor by its sum over the ranks, in place: one message for all of a dtype."""
    if alone(ranks):
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat)
        for tensor, summed in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def from_first(tensor: torch.Tensor, ranks: int) -> torch.Tensor:
    """The first rank's `tensor`; the same shape and dtype on all ranks."""
    if not alone(ranks):
        dist.broadcast(tensor, 0)
    return tensor
