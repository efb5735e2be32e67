"""Serving a memory from one process, for as long as it is needed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray import serve

from raexmc_ray.files import Folder
from raexmc_ray.serve.app import build_app
from raexmc_ray.serve.guard import TOKENS, Tokens, refuse_open_door
from raexmc_ray.serve.rest import APPLICATION, connect, wait_until_running
from raexmc_ray.serve.schema import ServeSettings

IDLE_S = 620
"""How long an idle connection is kept: longer than callers keep it, Go's 90 s and Google's load balancers 600. What is
sent on one that is just being closed is lost."""


@contextmanager
def serving(settings: ServeSettings, *, host: str = "127.0.0.1", port: int = 8000) -> Iterator[str]:
    """Serve a memory over the connected cluster for as long as it is needed; gives the URL once it answers.

    Raises FileNotFoundError, SnapshotError, DeploymentFailedError; ValueError for an open door, for a port that is
    taken, and where the cluster serves something already, which would end with this.
    """
    settings = _from_anywhere(settings)
    build_app(settings)  # what is wrong with the memory is said here, and not in a log of Serve's
    if os.environ.get("RAY_ADDRESS"):
        _refuse_tokens_of_this_shell(settings)
    else:
        refuse_open_door(settings, Tokens(settings.tokens_file), host)
        _refuse_taken(host, port)
    client = connect()
    if others := sorted(client.get_serve_details().get("applications", {})):
        raise ValueError(
            f"this cluster serves {', '.join(others)} already, which would end here: `serve deploy` a config that has "
            "all of them, or unset RAY_ADDRESS to serve on a cluster of its own"
        )
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "raexmc_ray.serve.app:build_app",
        "args": settings.model_dump(mode="json"),
        # Serve would write a line for each call between deployments; ours are one a request and one a batch.
        "logging_config": {"enable_access_log": False},
    }
    http = {"host": host, "port": port, "keep_alive_timeout_s": IDLE_S}
    try:
        client.deploy_applications({"proxy_location": "HeadOnly", "http_options": http, "applications": [application]})
        wait_until_running(client, APPLICATION)
        yield url_of(host, port)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's


def url_of(host: str, port: int) -> str:
    """Where a server that listens on `host` is reached from its own machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _from_anywhere(settings: ServeSettings) -> ServeSettings:
    """The settings with whole paths: replicas, and `rollout`, have another working directory."""
    memory, file = settings.memory, settings.tokens_file
    whole = {
        "memory": memory if "://" in memory else str(Folder.at(memory)),
        "tokens_file": str(Path(file).absolute()) if file else None,
    }
    return settings.model_copy(update=whole)


def _refuse_taken(host: str, port: int) -> None:
    """Raise ValueError where something listens on the port. Serve would share it with another Serve, and each of the
    two would get some of the requests."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed a moment ago is free
            probe.bind((host, port))
    except OSError as error:
        raise ValueError(
            f"port {port} of {host} cannot be had ({error.strerror}): end what listens there, or choose another --port"
        ) from None


def _refuse_tokens_of_this_shell(settings: ServeSettings) -> None:
    """Raise ValueError where the caller counts on tokens that the replicas of a running cluster do not see. Whether the
    door is open is for them to say: they have the cluster's environment, and the files of its nodes."""
    if os.environ.get(TOKENS) and not settings.tokens_file:
        raise ValueError(
            f"{TOKENS} of this shell guards nothing on a cluster that runs already: its replicas have the environment "
            f"it was started with: set tokens_file (of every node), or set {TOKENS} where the cluster starts and unset "
            "it here"
        )
