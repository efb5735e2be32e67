"""The deployments behind the ingress: a text encoder that batches, and a memory shard.

Both do what they do for the snapshot that a call names. `reconfigure` has them open the one in use before Serve sends
them anything; `hold` opens one that is about to be. The argument `call` is for the router.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from ray import serve
from ray.serve.config import RequestRouterConfig

from raexmc_ray.files import Folder
from raexmc_ray.memory.hits import Hits
from raexmc_ray.memory.index import Lists, use_threads
from raexmc_ray.memory.shard import Shard, cut_texts
from raexmc_ray.memory.snapshot import open_snapshot
from raexmc_ray.recipe import Neighbours, Precision
from raexmc_ray.serve.again import AnotherReplicaRouter, Call
from raexmc_ray.serve.batching import Batcher
from raexmc_ray.serve.held import Held

if TYPE_CHECKING:
    from raexmc_ray.encoder import TextEncoder

MAX_ONGOING = 1024
"""Calls that Serve hands to a replica at a time. The ingress bounds what comes in; nothing queues before that."""
ROUTER = RequestRouterConfig(request_router_class=AnotherReplicaRouter)  # type: ignore[arg-type]  # pydantic's plugin


@serve.deployment(max_ongoing_requests=MAX_ONGOING, request_router_config=ROUTER)
class Encoder:
    """Texts to embeddings; the texts of calls that wait together are encoded together."""

    def __init__(self, memory: Folder, threads: int, gpu: bool, precision: Precision, batch_texts: int) -> None:
        def open_(snapshot: str) -> TextEncoder:
            # Not above: a shard's replica imports this module, and would start later by torch and transformers.
            from raexmc_ray.encoder import use_hardware

            return use_hardware(open_snapshot(memory, snapshot).encoder(), threads, precision, gpu=gpu)

        self._encoders = Held(open_)
        self._batcher: Batcher[tuple[str, list[str]], np.ndarray] = Batcher(
            self._encode, size=lambda call: len(call[1]), max_size=batch_texts
        )

    async def reconfigure(self, config: dict[str, Any]) -> None:
        await self.hold(config["snapshot"])

    async def hold(self, snapshot: str) -> None:
        """Have this snapshot's encoder ready."""
        await self._encoders.get(snapshot)

    async def encode(self, snapshot: str, texts: list[str], *, call: Call) -> np.ndarray:
        """Embeddings by the snapshot's encoder: float32 [texts, d]."""
        return await self._batcher.submit((snapshot, texts))

    async def _encode(
        self, calls: Sequence[tuple[str, list[str]]], answer: Callable[[int, np.ndarray | Exception], None]
    ) -> None:
        for snapshot in {name for name, _ in calls}:
            mine = [i for i, (name, _) in enumerate(calls) if name == snapshot]
            texts = [text for i in mine for text in calls[i][1]]
            try:
                encoder = await self._encoders.get(snapshot)
                embeddings = await asyncio.to_thread(encoder.encode, texts)
            except Exception as error:  # no other snapshot's calls fail for it
                for i in mine:
                    answer(i, error)
                continue
            ends = np.cumsum([len(calls[i][1]) for i in mine])
            for i, part in zip(mine, np.split(embeddings, ends[:-1]), strict=True):
                answer(i, part)


@serve.deployment(max_ongoing_requests=MAX_ONGOING, request_router_config=ROUTER)
class MemoryShard:
    """One shard of the memory."""

    def __init__(self, memory: Folder, shard: int, threads: int, gpu: bool) -> None:
        use_threads(threads)
        self._shards = Held(lambda snapshot: Shard(open_snapshot(memory, snapshot), shard, gpu=gpu))

    async def reconfigure(self, config: dict[str, Any]) -> None:
        await self.hold(config["snapshot"])

    async def hold(self, snapshot: str) -> None:
        """Have this snapshot's shard open."""
        await self._shards.get(snapshot)

    async def search(
        self,
        snapshot: str,
        queries_BD: np.ndarray,
        neighbours: Neighbours,
        lists: Lists | None,
        asked: Neighbours,
        *,
        call: Call,
    ) -> Hits:
        """This shard's best keys for each query, as `Shard.search` has them."""
        # Not in a thread: a search keeps all the shard's threads busy, so that two at a time would be no faster. Serve
        # asks for a replica's health on another loop, or between two searches.
        return (await self._shards.get(snapshot)).search(queries_BD, neighbours, lists, asked)

    async def keys(self, snapshot: str, key_ids: np.ndarray, characters: int, *, call: Call) -> pa.Table:
        """What `Shard.keys` has, with texts of at most so many characters."""
        return cut_texts((await self._shards.get(snapshot)).keys(key_ids), characters)
