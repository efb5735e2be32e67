"""Deploying the application through Serve's REST API, and moving it from one snapshot to another while it answers."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from raexmc_ray.files import Folder
from raexmc_ray.memory.snapshot import open_snapshot, publish_current, verify
from raexmc_ray.progress import said_if_long
from raexmc_ray.serve.app import build_app
from raexmc_ray.serve.errors import DeploymentFailedError
from raexmc_ray.serve.guard import TOKENS, Tokens, refuse_open_door
from raexmc_ray.serve.schema import ServeSettings

APPLICATION = "raexmc"
POLL_S, PATIENCE_S = 0.3, 600.0
LASTING_S = 60.0
"""How long a roll-out goes on where Serve says that the application failed: it says so of any replica that is lost
meanwhile, and has put another in its place by then."""
IDLE_S = 620
"""How long an idle connection is kept: longer than callers keep it, Go's 90 s and Google's load balancers 600. What is
sent on one that is just being closed is lost."""
logger = logging.getLogger("raexmc_ray")


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
    client = _client()
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
        _wait(client, APPLICATION)
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


def rollout(snapshot: str | None = None, application: str = APPLICATION) -> tuple[str, str]:
    """Move a running application to a snapshot, the memory's current one where it is left out; gives (from, to).

    Every byte is read against its checksum, and every replica has the snapshot open, before the first request is
    answered from it: until then nothing has changed. Broken off, the same call goes on. Raises SnapshotError,
    FileNotFoundError, DeploymentFailedError, ValueError where there is no such application.
    """
    return _move(snapshot, application, back=False)


def rollback(application: str = APPLICATION) -> tuple[str, str]:
    """Move a running application back to the snapshot before, and make that the memory's current one, so that
    nothing that starts later takes up the one that was left. Gives (from, to).

    Called again it stays where it went back to: broken off, the same call goes on.
    """
    previous = _user_config(_deployed(_client(), application)).get("previous")
    if not previous:
        raise ValueError(f"the application {application!r} has not been rolled out since it was deployed")
    return _move(previous, application, back=True)


def _move(snapshot: str | None, application: str, *, back: bool) -> tuple[str, str]:
    client = _client()
    config = _deployed(client, application)
    settings = ServeSettings.model_validate(config["args"])
    memory = Folder.at(settings.memory)
    before, previous = _in_use(config, client, application), _user_config(config).get("previous")
    target = open_snapshot(memory, snapshot)
    now = open_snapshot(memory, before)
    if target.manifest.shards != now.manifest.shards:
        raise ValueError(
            f"snapshot {target.manifest.id} has {target.manifest.shards} shards, the application runs "
            f"{now.manifest.shards}: deploy it anew (`serve deploy`)"
        )
    with said_if_long(f"checking every byte of snapshot {target.manifest.id}"):
        for _ in verify(target):
            pass
    names = ["Ingress", "Encoder", *(f"MemoryShard-{shard}" for shard in range(target.manifest.shards))]
    with said_if_long(f"waiting for every replica to open snapshot {target.manifest.id}"):
        _hold(client, target.manifest.id, names, application)
    if back:
        publish_current(memory, target.manifest.id)
        previous = target.manifest.id
    elif target.manifest.id != before:  # whoever stays where they are goes back to where they came from
        previous = before
    with said_if_long(f"waiting for every replica to move to snapshot {target.manifest.id}"):
        _set_user_config(client, application, names, {"snapshot": target.manifest.id, "previous": previous})
        _wait(client, application, LASTING_S)
    return before, target.manifest.id


class _Client(ServeSubmissionClient):
    """Of Serve's REST API, whose errors are the cause why a deployment fails."""

    def _raise_error(self, r: Any) -> None:
        raise DeploymentFailedError(f"Ray Serve answers {r.status_code}: {r.text.strip()}")


def _client() -> ServeSubmissionClient:
    url = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).dashboard_url
    if not url:
        raise DeploymentFailedError("this cluster has no dashboard, which Serve is deployed through")
    return _Client(f"http://{url}")


def _deployed(client: ServeSubmissionClient, application: str) -> dict[str, Any]:
    """The config that an application runs by. Raises ValueError."""
    applications = client.get_serve_details().get("applications", {})
    config = applications.get(application, {}).get("deployed_app_config")
    if not config:
        raise ValueError(f"no application {application!r} was deployed on this cluster: there are {list(applications)}")
    return dict(config)


def _user_config(config: dict[str, Any]) -> dict[str, Any]:
    """The `user_config` that was set by a roll-out; empty before the first."""
    ingress = [d for d in config.get("deployments") or [] if d["name"] == "Ingress"]
    return (ingress[0].get("user_config") or {}) if ingress else {}


def _in_use(config: dict[str, Any], client: ServeSubmissionClient, application: str) -> str:
    """The snapshot that an application answers from."""
    rolled = _user_config(config).get("snapshot")
    if rolled:
        return str(rolled)
    deployments = _details(client, application)["deployments"]
    return str(deployments["Ingress"]["deployment_config"]["user_config"]["snapshot"])


def _hold(client: ServeSubmissionClient, snapshot: str, names: list[str], application: str) -> None:
    """Have every replica of these deployments open a snapshot beside the one in use.

    A replica that Serve moves is not to be reached meanwhile: what an earlier roll-out left under way is waited for,
    but not for longer than LASTING_S, so that an application none of whose replicas start can be moved away. One that
    is lost meanwhile is waited for, until Serve has put another in its place. Raises DeploymentFailedError where they
    are lost for longer than LASTING_S: they may have no memory for two snapshots.
    """
    ends = time.monotonic() + LASTING_S
    while _details(client, application).get("status") == "DEPLOYING" and time.monotonic() < ends:
        time.sleep(POLL_S)
    waiting = {name: serve.get_deployment_handle(name, application) for name in names}
    lost: dict[str, float] = {}
    while waiting:
        calls = {name: handle.broadcast("hold", snapshot) for name, handle in waiting.items()}
        for name, call in calls.items():
            try:
                call.results(timeout_s=PATIENCE_S)
                del waiting[name]
            except DeploymentUnavailableError:
                pass
            except RayActorError as error:
                now = time.monotonic()
                if now - lost.setdefault(name, now) > LASTING_S:
                    said = f"replicas of {name} are lost while they open snapshot {snapshot}: nothing was moved"
                    raise DeploymentFailedError(said) from error
                ends = now + LASTING_S
        if waiting and time.monotonic() > ends:
            logger.warning("no replica of %s runs: it has nothing open before it is moved", ", ".join(waiting))
            return
        if waiting:
            time.sleep(POLL_S)


def _set_user_config(
    client: ServeSubmissionClient, application: str, names: list[str], user_config: dict[str, Any]
) -> None:
    """Deploy what is deployed, with this `user_config`: Serve then restarts nothing."""
    details = client.get_serve_details()
    applications = []
    for name, running in details["applications"].items():
        config = running.get("deployed_app_config")
        if not config:
            raise ValueError(f"the application {name!r} was not deployed by a config, and would be deleted by this one")
        if name == application:
            others = {d["name"]: d for d in config.get("deployments") or []}
            config["deployments"] = [{**others.pop(n, {"name": n}), "user_config": user_config} for n in names]
            config["deployments"] += others.values()
        applications.append(config)
    # Of the whole cluster, and taken away where it is not said again.
    capacity = details.get("target_capacity")
    client.deploy_applications(
        {"applications": applications, **({} if capacity is None else {"target_capacity": capacity})}
    )


def _details(client: ServeSubmissionClient, application: str) -> dict[str, Any]:
    """What Serve says of an application; empty where there is none."""
    return dict(client.get_serve_details().get("applications", {}).get(application, {}))


def _wait(client: ServeSubmissionClient, application: str, lasting_s: float = 0.0) -> None:
    """Until the application runs as it was last told to. Raises DeploymentFailedError, where it was said to have failed
    for `lasting_s` seconds."""
    ends, well = time.monotonic() + PATIENCE_S, time.monotonic()
    while True:
        running = _details(client, application)
        if running.get("status") == "RUNNING":
            return
        now = time.monotonic()
        if running.get("status") not in ("DEPLOY_FAILED", "UNHEALTHY"):
            well = now
        if now - well > lasting_s or now > ends:
            said = [running.get("message", "")]
            said += [d.get("message", "") for d in running.get("deployments", {}).values()]
            lines = [line for text in said for line in text.strip().splitlines() if line.strip()]
            raise DeploymentFailedError(f"the application {application!r} does not run: {lines[-1] if lines else ''}")
        time.sleep(POLL_S)
