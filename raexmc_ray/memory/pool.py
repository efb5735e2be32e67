"""Ray: the shards of a snapshot in actors, spread over the cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raexmc_ray.cluster import living_nodes, refuse_unplaceable, usable_cpus
from raexmc_ray.files import Folder
from raexmc_ray.memory.hits import Hits, search_all
from raexmc_ray.memory.index import Lists, use_threads
from raexmc_ray.memory.shard import Shard, join_keys, key_rows
from raexmc_ray.memory.snapshot import Snapshot, open_snapshot
from raexmc_ray.recipe import Neighbours

if TYPE_CHECKING:
    from raexmc_ray.local import Memory

PUT_ABOVE_BYTES = 100_000
"""Larger queries are put in shared memory once; smaller ones travel inside each call."""

OPENING_S = 1800.0
"""For all shards to be copied from an object store, and read against their checksums."""
SHARD_CPUS = 0.25
"""What a shard's actor reserves, or less where all would not fit: most of the time it waits."""
ANYWHERE = ""
"""The node of a copy that is spread over the cluster."""
_Question = tuple[np.ndarray, Neighbours, Lists | None, Neighbours]
"""What `Shard.search` is asked."""


class ShardUnavailableError(ConnectionError):
    """A shard did not answer. An answer without it would be partial, so there is none."""


# Calls are made again without a bound: until Ray knows that a node is gone, each try to reach an actor there would
# count. What bounds a call is the pool's deadline.
@ray.remote(max_restarts=-1, max_task_retries=-1)
class ShardActor:
    """One shard in a process of its own. Killed, it comes back from the snapshot, and the call is made again."""

    def __init__(self, memory: Folder, snapshot: str, shard: int, threads: int, gpu: bool) -> None:
        use_threads(threads)
        self._where = memory, snapshot, shard, gpu
        self._opened: Shard | None = None

    def _open(self, *, verify: bool) -> Shard:
        memory, snapshot, shard, gpu = self._where
        # Not kept: with the snapshot go the copies of an object store's files, which a kill would leave behind.
        return Shard(open_snapshot(memory, snapshot), shard, verify=verify, gpu=gpu)

    @property
    def _shard(self) -> Shard:
        if self._opened is None:
            # A shard that comes back must be there in no time: of local files every byte was read, by `verify`, when
            # there is a search. What is copied from an object store nobody has read yet.
            self._opened = self._open(verify=not self._where[0].is_local)
        return self._opened

    def verify(self) -> None:
        """Open the shard once every byte was read against its checksum. The first call; made again, as all are, where
        the process is lost meanwhile. Raises SnapshotError."""
        self._opened = self._open(verify=True)

    def search(self, question: _Question) -> Hits:
        return self._shard.search(*question)

    def keys(self, key_ids: np.ndarray) -> pa.Table:
        return self._shard.keys(key_ids)

    def pid(self) -> int:
        """The process that holds the shard: for those who watch it."""
        return os.getpid()


class ShardPool:
    """All shards of a snapshot, each in an actor; a context manager that ends them.

    They are spread over the cluster once, or there are copies: all of them on each of some nodes, for the workers there
    to share. Searches then stay on their node, and more nodes answer more of them.
    """

    def __init__(
        self,
        memory: Folder,
        snapshot: Snapshot,
        *,
        cpus: float = SHARD_CPUS,
        gpu: bool = False,
        timeout_s: float = 120.0,
        nodes: Sequence[str] = (),
    ) -> None:
        """cpus: what each actor reserves; it searches with as many threads, one at least. gpu: give each a GPU.
        timeout_s: after which a call gives up on a shard. nodes: ids of those that get a copy. Raises ValueError where
        the cluster has no room for all shards."""
        self.timeout_s = timeout_s
        self._quantizer = snapshot.quantizer()
        manifest = snapshot.manifest
        # Ray sees none of FAISS's memory: it must be told.
        resources = {"num_cpus": cpus, "num_gpus": int(gpu), "memory": manifest.shard_memory}
        if not nodes:
            wanted = {"CPU": cpus, "memory": manifest.shard_memory} | ({"GPU": 1} if gpu else {})
            remedy = "build the memory with more shards (memory.shards), or with an index of fewer bytes a key"
            refuse_unplaceable("a shard's actor", wanted, remedy, manifest.shards)
        threads = max(1, int(cpus))
        self._copies: dict[str, list[Any]] = {}
        for node in nodes or [ANYWHERE]:
            # The node is where they begin: where it is lost, or has no room, they are started elsewhere.
            there = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True) if nodes else "SPREAD"
            make = ShardActor.options(**resources, scheduling_strategy=there)  # type: ignore[attr-defined]  # ray.remote's
            self._copies[node] = [
                make.remote(memory, manifest.id, shard, threads, gpu) for shard in range(manifest.shards)
            ]
        for copy in self._copies.values():  # all of them open at the same time
            self._answers(copy, "verify", patience_s=max(timeout_s, OPENING_S))

    @property
    def actors(self) -> list[Any]:
        """The shards that this process asks, in their order: those on its node, or else always the same copy."""
        if len(self._copies) == 1:
            return next(iter(self._copies.values()))
        node = ray.get_runtime_context().get_node_id()
        return self._copies.get(node) or list(self._copies.values())[int(node, 16) % len(self._copies)]

    def search(self, queries_BD: np.ndarray, neighbours: Neighbours) -> Hits:
        """The memory's best keys for each query: float32 [B, d], of unit length.

        Raises ShardUnavailableError, which names the shard, rather than answer without it.
        """
        since = time.monotonic()  # of both rounds, where a second one is needed
        lists = self._quantizer.assign(queries_BD) if self._quantizer else None

        def ask(rows: Any, asked: Neighbours) -> list[Hits]:
            question: _Question = (queries_BD[rows], neighbours, lists and lists.of(rows), asked)
            large = question[0].nbytes > PUT_ABOVE_BYTES
            return self._ask("search", ray.put(question) if large else question, since=since)

        return search_all(ask, neighbours, len(self.actors))

    def keys(self, key_ids: np.ndarray) -> dict[int, dict[str, str]]:
        """{key id: {"kind", "uid", "text"}} of these keys."""
        return join_keys(self._ask("keys", key_ids))

    def key_rows(self, key_ids: np.ndarray) -> pa.Table:
        """Rows (key_id, kind, uid, text), one for each of `key_ids`, which may be there more than once."""
        return key_rows(self._ask("keys", np.unique(key_ids)), key_ids)

    def close(self) -> None:
        """End the actors."""
        for copy in self._copies.values():
            for actor in copy:
                ray.kill(actor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, method: str, *arguments: Any, since: float | None = None) -> list[Any]:
        """What each shard's `method` returns, in shard order, `timeout_s` after `since` (of `time.monotonic`; now) at
        the latest."""
        return self._answers(self.actors, method, *arguments, patience_s=self.timeout_s, since=since)

    def _answers(
        self, actors: list[Any], method: str, *arguments: Any, patience_s: float, since: float | None = None
    ) -> list[Any]:
        waited = 0.0 if since is None else time.monotonic() - since
        calls = [getattr(actor, method).remote(*arguments) for actor in actors]
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=max(0.0, patience_s - waited))
        late = [shard for shard, call in enumerate(calls) if call not in ready]
        for shard in late:  # one that comes back must not work through what nobody waits for
            ray.cancel(calls[shard])
        if late:
            raise ShardUnavailableError(f"shards {late} did not answer within {patience_s:g} s")
        with suppress(ray.exceptions.RayError):
            return ray.get(calls)  # all at once: one by one, each costs a round trip to the object store
        answers = []  # or which of them has none
        for shard, call in enumerate(calls):
            try:
                answers.append(ray.get(call))
            except ray.exceptions.RayActorError as error:
                raise ShardUnavailableError(f"shard {shard} is gone and did not come back: {error}") from error
            except ray.exceptions.RayTaskError as error:  # what it raised itself, without the lines of its process
                raise error.cause from error
        return answers


def open_in_actors(memory: Folder, snapshot: str | None = None, *, gpu: bool = False) -> tuple[Memory, ShardPool]:
    """The memory with its shards in actors, each with a GPU if asked for, and the pool to close afterwards.

    For a command: its encoder takes all CPUs, and torch one thread in each operation.
    """
    # Not above: a shard's actor imports this module, and would start later by torch and SciPy.
    from raexmc_ray.encoder import use_hardware
    from raexmc_ray.local import Memory

    opened = open_snapshot(memory, snapshot)
    # Before the actors, which would be left behind if it is refused.
    encoder = use_hardware(opened.encoder(), usable_cpus())
    there = sum(node["Resources"].get("CPU", 0) for node in living_nodes())
    pool = ShardPool(memory, opened, cpus=min(SHARD_CPUS, there / (2 * opened.manifest.shards)), gpu=gpu)
    return Memory(opened, pool, encoder), pool
