"""The ingress itself, with an encoder and shards in this process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

import raexmc_ray
from raexmc_ray.files import Folder
from raexmc_ray.memory.shard import Shard, cut_texts
from raexmc_ray.serve.ingress import Ingress
from raexmc_ray.serve.schema import ServeSettings


async def ingress_of(
    settings: ServeSettings, before: Mapping[tuple[int, str], Callable[[], Awaitable[None]]] | None = None
) -> Any:
    """The ingress of a memory, on loopback. before: of (shard, method), what is awaited before each call of it."""
    opened = raexmc_ray.open(settings.memory)
    shards = [Shard(opened.snapshot, shard) for shard in range(opened.manifest.shards)]

    def handle(shard: int) -> Any:
        async def call(method: str, *arguments: Any) -> Any:
            if first := (before or {}).get((shard, method)):
                await first()
            return getattr(shards[shard], method)(*arguments)

        async def search(snapshot: str, *arguments: Any) -> Any:
            return await call("search", *arguments)

        async def keys(snapshot: str, key_ids: np.ndarray, characters: int) -> Any:
            return cut_texts(await call("keys", key_ids), characters)

        return SimpleNamespace(search=SimpleNamespace(remote=search), keys=SimpleNamespace(remote=keys))

    async def encode(snapshot: str, texts: list[str]) -> np.ndarray:
        return opened.encoder.encode(texts)

    plain = Ingress.func_or_class.__bases__[0]  # without what Serve wraps around it
    with patch("raexmc_ray.serve.ingress._http_host", lambda: "127.0.0.1"):
        encoder = SimpleNamespace(encode=SimpleNamespace(remote=encode))
        ingress = plain(settings, Folder.at(settings.memory), encoder, *map(handle, range(len(shards))))
    await ingress.reconfigure({"snapshot": opened.manifest.id})
    return ingress
