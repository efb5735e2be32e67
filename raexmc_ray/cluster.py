"""Connecting to Ray: the cluster that is there, or one of this machine's own for as long as it is needed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray

CLUSTER_CPUS = "RAEXMC_NUM_CPUS"
"""Environment variable: CPUs of a local cluster that is started here; the `usable_cpus`, four at least,
where it is not set (Train and Data each want a few, and most of them wait most of the time)."""

KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
}
"""glibc's settings for a process that encodes. Ray Train trains in a thread, and Serve encodes in one: a thread's own
malloc arena gives memory back to the kernel at every step, which on two cores took a sixth of the speed, in page
faults."""

SLEEP_WHEN_IDLE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Of a process that computes with OpenMP and waits for others: its threads sleep when there is nothing to do. By
default they spin for a while, on cores that the next process on a query's way needs. Read where OpenMP is loaded."""

INLINE_BYTES = 4 << 20
"""What a call to a process of a local cluster returns comes with its reply up to this size. By default that is 100 kB,
and what is larger takes the way by the object store, which costs a batch of searches a twentieth of its time."""

API_SERVER = "RAY_API_SERVER_ADDRESS"
"""Environment variable: where Ray's own processes ask for the state of their cluster. Where it is not set they ask any
cluster of the machine that has a dashboard; Ray Train, which asks whether its controller is alive, then takes it for
dead, and ends its workers."""
NOWHERE = "http://127.0.0.1:9"

NODE_GROUP = "ray.io/node-group"
"""Label of the nodes of a cluster that `ray up` or KubeRay keeps, from Ray's autoscaler (v2) or from Kubernetes."""
logger = logging.getLogger("raexmc_ray")


def usable_cpus() -> int:
    """CPUs that this process may use: those of its affinity and of its container's quota, which `os.cpu_count` does not
    know."""
    from joblib import cpu_count  # a fifth of a second, for those who need it

    return int(cpu_count())


@contextmanager
def connected(*, dashboard: bool = False, existing: bool = False) -> Iterator[None]:
    """Connect to the cluster at RAY_ADDRESS, or else start a local one (with a dashboard, if asked for) and end it
    afterwards.

    Inside a Ray job or a process that is connected already, that connection is used and left as it is.
    existing: start none; with no RAY_ADDRESS, the cluster that runs on this machine is used. Raises ConnectionError.
    """
    if ray.is_initialized():
        yield
        return
    cpus = int(os.environ.get(CLUSTER_CPUS, max(4, usable_cpus())))
    address = os.environ.get("RAY_ADDRESS") or ("auto" if existing else None)
    asks_nobody = not address and not dashboard and API_SERVER not in os.environ
    if asks_nobody:
        os.environ[API_SERVER] = NOWHERE
    try:
        ray.init(
            address=address or "local",
            num_cpus=None if address else cpus,
            include_dashboard=None if address else dashboard,
            # It works for the command that waits for it. By default Ray's workers step back behind all other processes.
            _system_config=None if address else {"worker_niceness": 0, "max_direct_call_object_size": INLINE_BYTES},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    finally:
        if asks_nobody:
            del os.environ[API_SERVER]  # the cluster's processes have it
    try:
        yield
    finally:
        ray.shutdown()


def refuse_unplaceable(what: str, wanted: Mapping[str, float], remedy: str, number: int = 1) -> None:
    """Raise ValueError where the nodes of the cluster have no room for so many of what wants so much of one node,
    {Ray's resource: how much}: Ray would wait for it for ever, and say nothing.

    Where more nodes may come by themselves (`_may_grow`), a warning is all.
    """
    nodes = living_nodes()
    room = _room_for(nodes, wanted)
    if room >= number:
        return
    nearest = _nearest(nodes, wanted)
    there = f"there is room for {room} of {number}" if room else f"the node that comes nearest has {_say(nearest)}"
    said = f"{what} wants {_say(wanted)} on one node, and {there}: {remedy}"
    if not _may_grow(nodes):
        raise ValueError(f"{said}, or add such a node")
    logger.warning("%s, unless the cluster adds such a node: waiting for one", said)


def _nearest(nodes: Sequence[Mapping[str, Any]], wanted: Mapping[str, float]) -> dict[str, float]:
    """What the node has of each that lacks the least: whose smallest share of what is wanted is the largest."""
    there = [{name: node["Resources"].get(name, 0) for name in wanted} for node in nodes]
    return max(there, key=lambda has: sorted(min(1, has[name] / much) for name, much in wanted.items()))


def _say(resources: Mapping[str, float]) -> str:
    return " and ".join(
        f"{much / 2**30:.1f} GiB of memory" if name == "memory" else f"{much:g} {name}"
        for name, much in resources.items()
    )


def count_gpus() -> int:
    """GPUs of the cluster; one where it has none yet, for a cluster that grows."""
    return max(1, int(ray.cluster_resources().get("GPU", 1)))  # type: ignore[no-untyped-call]  # Ray's


def living_nodes() -> list[Mapping[str, Any]]:
    """The nodes that there are, as Ray describes them: `Resources` and `Labels` among much else."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray's


def _room_for(nodes: Sequence[Mapping[str, Any]], wanted: Mapping[str, float]) -> int:
    """How many processes these nodes have room for, each of which wants so much of one node: what several nodes have
    left over is of no use to it. wanted: {Ray's resource: how much, above 0}."""
    return sum(
        min(math.floor(node["Resources"].get(name, 0) / much + 1e-9) for name, much in wanted.items()) for node in nodes
    )


def _may_grow(nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether more nodes may come by themselves when there is work for them: what these nodes have is not all then.

    Ray does not say what its autoscaler may start, only that a node is of a group that somebody keeps.
    """
    return any(NODE_GROUP in node["Labels"] for node in nodes)
