"""Connecting to Ray: the cluster that is there, or one of this machine's own for as long as it is needed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

CLUSTER_CPUS = "RAEXMC_NUM_CPUS"
"""Environment variable: CPUs of a local cluster that is started here; those of the machine, four at least,
where it is not set (Train and Data each want a few, and most of them wait most of the time)."""


@contextmanager
def connected() -> Iterator[None]:
    """Connect to the cluster at RAY_ADDRESS, or else start a local one and end it afterwards.

    Inside a Ray job or a process that is connected already, that connection is used and left as it is.
    """
    if ray.is_initialized():
        yield
        return
    cpus = int(os.environ.get(CLUSTER_CPUS, max(4, os.cpu_count() or 1)))
    address = os.environ.get("RAY_ADDRESS")
    ray.init(
        address=address or "local",
        num_cpus=None if address else cpus,
        include_dashboard=None if address else False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()
