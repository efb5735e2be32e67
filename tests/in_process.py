"""The ingress itself, with an encoder and shards in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

import raexmc_ray
from raexmc_ray.files import Folder
from raexmc_ray.memory.shard import Shard, cut_texts
from raexmc_ray.serve.again import Call
from raexmc_ray.serve.ingress import Ingress
from raexmc_ray.serve.schema import ServeSettings


def method(of_a_replica: Callable[..., Coroutine[Any, Any, Any]]) -> SimpleNamespace:
    """It, as a handle has it: a call begins at once, and what it gives can be awaited or cancelled."""
    return SimpleNamespace(remote=lambda *args, **kwargs: asyncio.ensure_future(of_a_replica(*args, **kwargs)))


async def ingress_of(
    settings: ServeSettings, before: Mapping[tuple[int, str], Callable[[], Awaitable[None]]] | None = None
) -> Any:
    """The ingress of a memory, on loopback. before: of (shard, method), what is awaited before each call of it."""
    opened = raexmc_ray.open(settings.memory)
    shards = [Shard(opened.snapshot, shard) for shard in range(opened.manifest.shards)]

    def handle(shard: int) -> Any:
        async def made(name: str, *arguments: Any) -> Any:
            if first := (before or {}).get((shard, name)):
                await first()
            return getattr(shards[shard], name)(*arguments)

        async def search(snapshot: str, *arguments: Any, call: Call) -> Any:
            return await made("search", *arguments)

        async def keys(snapshot: str, key_ids: np.ndarray, characters: int, *, call: Call) -> Any:
            return cut_texts(await made("keys", key_ids), characters)

        return SimpleNamespace(search=method(search), keys=method(keys))

    async def encode(snapshot: str, texts: list[str], *, call: Call) -> np.ndarray:
        return opened.encoder.encode(texts)

    plain = Ingress.func_or_class.__bases__[0]  # without what Serve wraps around it
    with patch("raexmc_ray.serve.ingress._http_host", lambda: "127.0.0.1"):
        encoder = SimpleNamespace(encode=method(encode))
        ingress = plain(settings, Folder.at(settings.memory), encoder, *map(handle, range(len(shards))))
    await ingress.reconfigure({"snapshot": opened.manifest.id})
    return ingress
