"""Runs a function as several ranks of a gloo group, each in a process of its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., dict[str, Any]], ranks: int, folder: Path, *arguments: Any) -> list[dict]:
    """What `function(rank, ranks, *arguments)` returned on each rank: tensors by name, or nested so."""
    if ranks == 1:
        return [function(0, 1, *arguments)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (ranks, port, folder, function, arguments), nprocs=ranks)
    return [torch.load(folder / f"{ranks}-{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, folder: Path, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.save(function(rank, ranks, *arguments), folder / f"{ranks}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
