"""Runs a function as several ranks of a gloo group, each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import free_port


def run_ranks(function: Callable[..., dict[str, Any]], ranks: int, folder: Path, *arguments: Any) -> list[dict]:
    """What `function(rank, ranks, *arguments)` returned on each rank: tensors by name, or nested so."""
    if ranks == 1:
        return [function(0, 1, *arguments)]
    mp.spawn(_rank, (ranks, free_port(), folder, function, arguments), nprocs=ranks)
    return [torch.load(folder / f"{ranks}-{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, folder: Path, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.save(function(rank, ranks, *arguments), folder / f"{ranks}-{rank}.pt")
    if dist.is_initialized():  # or the function has taken it away
        dist.barrier()
        dist.destroy_process_group()
