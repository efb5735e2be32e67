"""Moving a running application from one snapshot to another, and back, while it answers."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from raexmc_ray.files import Folder
from raexmc_ray.memory.snapshot import Snapshot, open_snapshot, publish_current, verify
from raexmc_ray.progress import said_if_long
from raexmc_ray.serve.errors import DeploymentFailedError
from raexmc_ray.serve.rest import (
    APPLICATION,
    PATIENCE_S,
    POLL_S,
    Client,
    config_of,
    connect,
    details_of,
    set_user_config,
    wait_until_running,
)
from raexmc_ray.serve.schema import ServeSettings

LASTING_S = 60.0
"""How long a roll-out goes on where Serve says that the application failed: it says so of any replica that is lost
meanwhile, and has put another in its place by then."""
logger = logging.getLogger("raexmc_ray")


def rollout(snapshot: str | None = None, application: str = APPLICATION) -> tuple[str, str]:
    """Move a running application to a snapshot, the memory's current one where it is left out; gives (from, to).

    Every byte is read against its checksum, and every replica has the snapshot open, before the first request is
    answered from it: until then nothing has changed. Broken off, the same call goes on. Raises SnapshotError,
    FileNotFoundError, DeploymentFailedError, ValueError where there is no such application.
    """
    client = connect()
    running = _Running.find(client, application)
    target = open_snapshot(running.memory, snapshot)
    _open_everywhere(client, running, target)
    # Whoever stays where they are goes back to where they came from.
    stays = target.manifest.id == running.snapshot
    _move(client, running, target, previous=running.previous if stays else running.snapshot)
    return running.snapshot, target.manifest.id


def rollback(application: str = APPLICATION) -> tuple[str, str]:
    """Move a running application back to the snapshot before, and make that the memory's current one, so that
    nothing that starts later takes up the one that was left. Gives (from, to).

    Called again it stays where it went back to: broken off, the same call goes on. Raises as `rollout` does, and
    ValueError where there is none to go back to.
    """
    client = connect()
    running = _Running.find(client, application)
    if not running.previous:
        raise ValueError(f"the application {application!r} has not been rolled out since it was deployed")
    target = open_snapshot(running.memory, running.previous)
    _open_everywhere(client, running, target)
    publish_current(running.memory, target.manifest.id)
    _move(client, running, target, previous=target.manifest.id)
    return running.snapshot, target.manifest.id


@dataclass(frozen=True)
class _Running:
    """An application that runs, and where it stands."""

    application: str
    memory: Folder
    snapshot: str
    """The one that it answers from."""
    previous: str | None
    """The one that a rollback goes to: None before the first roll-out."""

    @classmethod
    def find(cls, client: Client, application: str) -> _Running:
        """Raises ValueError where there is none."""
        config = config_of(client, application)
        settings = ServeSettings.model_validate(config["args"])
        set_by_us = {d["name"]: d for d in config.get("deployments") or []}.get("Ingress", {}).get("user_config") or {}
        if not (snapshot := set_by_us.get("snapshot")):  # as the builder of the application set it
            ingress = details_of(client, application)["deployments"]["Ingress"]
            snapshot = ingress["deployment_config"]["user_config"]["snapshot"]
        return cls(application, Folder.at(settings.memory), snapshot, set_by_us.get("previous"))


def _open_everywhere(client: Client, running: _Running, target: Snapshot) -> None:
    """Check a snapshot, and have every replica open it beside the one in use."""
    shards = open_snapshot(running.memory, running.snapshot).manifest.shards
    if target.manifest.shards != shards:
        raise ValueError(
            f"snapshot {target.manifest.id} has {target.manifest.shards} shards, the application runs "
            f"{shards}: deploy it anew (`serve deploy`)"
        )
    with said_if_long(f"checking every byte of snapshot {target.manifest.id}"):
        for _ in verify(target):
            pass
    with said_if_long(f"waiting for every replica to open snapshot {target.manifest.id}"):
        _hold(client, target.manifest.id, _deployments(target), running.application)


def _move(client: Client, running: _Running, target: Snapshot, previous: str | None) -> None:
    """Have every replica answer from a snapshot that it has open."""
    user_config: dict[str, Any] = {"snapshot": target.manifest.id, "previous": previous}
    with said_if_long(f"waiting for every replica to move to snapshot {target.manifest.id}"):
        set_user_config(client, running.application, _deployments(target), user_config)
        wait_until_running(client, running.application, LASTING_S)


def _deployments(snapshot: Snapshot) -> list[str]:
    """The names of the deployments that serve a snapshot."""
    return ["Ingress", "Encoder", *(f"MemoryShard-{shard}" for shard in range(snapshot.manifest.shards))]


def _hold(client: Client, snapshot: str, names: list[str], application: str) -> None:
    """Have every replica of these deployments open a snapshot beside the one in use.

    A replica that Serve moves is not to be reached meanwhile: what an earlier roll-out left under way is waited for,
    but not for longer than LASTING_S, so that an application none of whose replicas start can be moved away. One that
    is lost meanwhile is waited for, until Serve has put another in its place. Raises DeploymentFailedError where they
    are lost for longer than LASTING_S: they may have no memory for two snapshots.
    """
    ends = time.monotonic() + LASTING_S
    while details_of(client, application).get("status") == "DEPLOYING" and time.monotonic() < ends:
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
