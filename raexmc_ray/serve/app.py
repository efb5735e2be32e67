"""Binds the application: `serve run serve_configs/local.yaml`, or `raexmc serve MEMORY`."""

# No `from __future__ import annotations` here: Serve reads the type of `build_app`'s argument to validate `args` by it.
from ray.serve import Application

from raexmc_ray.files import Folder
from raexmc_ray.memory.snapshot import open_snapshot
from raexmc_ray.serve.deployments import Encoder, Ingress, MemoryShard
from raexmc_ray.serve.schema import ServeSettings


def build_app(settings: ServeSettings) -> Application:
    """Ingress, encoder and one deployment per shard, all of one snapshot.

    Raises FileNotFoundError and SnapshotError where the memory cannot be served.
    """
    memory = Folder.at(settings.memory)
    manifest = open_snapshot(memory, settings.snapshot).manifest
    encoder = Encoder.options(  # type: ignore[attr-defined]  # serve.deployment's
        num_replicas=settings.encoder_replicas,
        ray_actor_options={"num_cpus": settings.encoder_cpus, "num_gpus": settings.encoder_gpus},
    ).bind(memory, manifest.id, int(settings.encoder_cpus))
    shards = [
        MemoryShard.options(  # type: ignore[attr-defined]  # serve.deployment's
            name=f"MemoryShard-{shard}",
            num_replicas=settings.shard_replicas,
            ray_actor_options={"num_cpus": settings.shard_cpus},
        ).bind(memory, manifest.id, shard)
        for shard in range(manifest.shards)
    ]
    ingress = Ingress.options(ray_actor_options={"num_cpus": 0.1})  # type: ignore[attr-defined]  # serve.deployment's
    return ingress.bind(memory, manifest.id, settings.timeout_s, encoder, *shards)
