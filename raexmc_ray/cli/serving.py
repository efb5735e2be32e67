"""Commands around the application: serve, rollout, rollback."""

from __future__ import annotations

import logging
import os
import threading
from typing import Annotated

import typer

from raexmc_ray.cli.output import console
from raexmc_ray.recipe import Precision


def serve(
    memory: Annotated[str, typer.Argument(help="Folder or URL of the memory.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    tokens_file: Annotated[
        str | None, typer.Option(help="File of bearer tokens, one a line; also: RAEXMC_TOKENS.")
    ] = None,
    anonymous_access: Annotated[
        bool, typer.Option(help="Answer anyone who reaches the port, without a token.")
    ] = False,
    encoder_cpus: Annotated[
        int | None, typer.Option(min=1, help="Threads of the encoder; as many as CPUs, four at most, if left out.")
    ] = None,
    encoder_precision: Annotated[
        Precision,
        typer.Option(help="auto: bfloat16 on GPUs, float32 on CPUs; CPUs that have bfloat16 encode sooner in it."),
    ] = "auto",
    shard_replicas: Annotated[int, typer.Option(min=1, help="Replicas of each shard.")] = 1,
) -> None:
    """Answer over HTTP until Ctrl-C, with a page to try it. On a cluster: `serve deploy serve_configs/cluster.yaml`."""
    from raexmc_ray.cluster import connected, usable_cpus
    from raexmc_ray.serve.environment import ENVIRONMENT
    from raexmc_ray.serve.gate import REQUESTS
    from raexmc_ray.serve.run import serving
    from raexmc_ray.serve.schema import ServeSettings

    settings = ServeSettings.model_validate(
        {
            "memory": memory,
            "tokens_file": tokens_file,
            "anonymous_access": anonymous_access,
            "encoder_cpus": encoder_cpus or min(4, usable_cpus()),
            "encoder_precision": encoder_precision,
            "shard_replicas": shard_replicas,
        }
    )
    # A cluster that is started has them; this process has read Serve's own settings by now.
    os.environ |= {**ENVIRONMENT, REQUESTS: str(settings.limits.concurrent_requests)}
    with connected(dashboard=True), serving(settings, host=host, port=port) as url:
        console.print(
            f"{url} has the page, {url}/v1 the API, {url}/openapi.json its description; Ctrl-C ends it", soft_wrap=True
        )
        threading.Event().wait()


Application = Annotated[str, typer.Option(help="Name of the application in the Serve config.")]


def rollout(
    snapshot: Annotated[
        str | None, typer.Argument(help="Snapshot to move to; the memory's current one where left out.")
    ] = None,
    application: Application = "raexmc",
) -> None:
    """Move a running application, on the cluster at RAY_ADDRESS or this machine's, to another snapshot, while it
    answers."""
    from raexmc_ray.cluster import connected
    from raexmc_ray.serve.environment import WITHOUT_A_LOOP

    os.environ |= WITHOUT_A_LOOP
    from raexmc_ray.serve.rollout import rollout

    _quieten_serve()
    with connected(existing=True):
        before, after = rollout(snapshot, application)
    console.print(f"{application} answers from {after}; before it was {before}", soft_wrap=True)


def rollback(application: Application = "raexmc") -> None:
    """Move a running application back to the snapshot before, and make that the memory's current one."""
    from raexmc_ray.cluster import connected
    from raexmc_ray.serve.environment import WITHOUT_A_LOOP

    os.environ |= WITHOUT_A_LOOP
    from raexmc_ray.serve.rollout import rollback

    _quieten_serve()
    with connected(existing=True):
        before, after = rollback(application)
    console.print(f"{application} answers from {after} again, no longer from {before}", soft_wrap=True)


def _quieten_serve() -> None:
    """What Serve says of its own, line by line, is for a replica's log; it sets this itself where it is imported."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
