"""Binds the application: `serve run serve_configs/local.yaml`, or `raexmc serve MEMORY`."""

# No `from __future__ import annotations` here: Serve reads the type of `build_app`'s argument to validate `args` by it.
from typing import Any

from ray.serve import Application

from raexmc_ray.cluster import KEEP_FREED_MEMORY, SLEEP_WHEN_IDLE
from raexmc_ray.files import Folder
from raexmc_ray.memory.snapshot import open_snapshot
from raexmc_ray.serve.deployments import Encoder, MemoryShard
from raexmc_ray.serve.gate import SPARE
from raexmc_ray.serve.ingress import Ingress
from raexmc_ray.serve.schema import ServeSettings


def build_app(settings: ServeSettings) -> Application:
    """Ingress, encoder and one deployment per shard, all of one snapshot.

    Raises FileNotFoundError and SnapshotError where the memory cannot be served.
    """
    memory = Folder.at(settings.memory)
    manifest = open_snapshot(memory, settings.snapshot).manifest
    # `max_surge_percent`: a new replica is there before the old one goes, so `serve deploy` needs no downtime either.
    common: dict[str, Any] = {"user_config": {"snapshot": manifest.id}, "max_surge_percent": 100}
    threads = max(1, int(settings.encoder_cpus))
    encoders: dict[str, Any] = {"num_replicas": settings.encoder_replicas}
    if settings.encoder_replicas_at_most:
        bounds = {"min_replicas": settings.encoder_replicas, "max_replicas": settings.encoder_replicas_at_most}
        # One with a call in hand is busy; of the batches on their way some are in the hands of shards.
        encoders = {"autoscaling_config": {**bounds, "target_ongoing_requests": 1}}
    encoder = Encoder.options(  # type: ignore[attr-defined]  # serve.deployment's
        ray_actor_options={
            "num_cpus": settings.encoder_cpus,
            "num_gpus": settings.encoder_gpus,
            "runtime_env": {"env_vars": KEEP_FREED_MEMORY},
        },
        **encoders,
        **common,
    ).bind(memory, threads, settings.encoder_gpus > 0, settings.encoder_precision, settings.batch_texts)
    # Ray sees none of FAISS's memory: it must be told. A roll-out has two snapshots open, but pages of files that
    # nobody reads any more are given back.
    shards = [
        MemoryShard.options(  # type: ignore[attr-defined]  # serve.deployment's
            name=f"MemoryShard-{shard}",
            num_replicas=settings.shard_replicas,
            ray_actor_options={
                "num_cpus": settings.shard_cpus,
                "num_gpus": settings.shard_gpus,
                "memory": manifest.shard_memory,
                "runtime_env": {"env_vars": SLEEP_WHEN_IDLE},
            },
            **common,
        ).bind(memory, shard, max(1, int(settings.shard_cpus)), settings.shard_gpus > 0)
        for shard in range(manifest.shards)
    ]
    ingress = Ingress.options(  # type: ignore[attr-defined]  # serve.deployment's
        num_replicas=settings.ingress_replicas,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=settings.limits.concurrent_requests + SPARE,
        max_queued_requests=settings.limits.concurrent_requests,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        **common,
    )
    return ingress.bind(settings, memory, encoder, *shards)
