"""Serve's REST API, through which applications are deployed: what the connected cluster runs, and whether it does."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from raexmc_ray.serve.errors import DeploymentFailedError

APPLICATION = "raexmc"
POLL_S, PATIENCE_S = 0.3, 600.0


class Client(ServeSubmissionClient):
    """Of Serve's REST API, whose errors are the cause why a deployment fails."""

    def _raise_error(self, r: Any) -> None:
        raise DeploymentFailedError(f"Ray Serve answers {r.status_code}: {r.text.strip()}")


def connect() -> Client:
    """A client of the connected cluster, or of one of its own."""
    url = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).dashboard_url
    if not url:
        raise DeploymentFailedError("this cluster has no dashboard, which Serve is deployed through")
    return Client(f"http://{url}")


def details_of(client: Client, application: str) -> dict[str, Any]:
    """What Serve says of an application; empty where there is none."""
    return dict(client.get_serve_details().get("applications", {}).get(application, {}))


def config_of(client: Client, application: str) -> dict[str, Any]:
    """The config that an application was deployed by. Raises ValueError where there is none."""
    applications = client.get_serve_details().get("applications", {})
    config = applications.get(application, {}).get("deployed_app_config")
    if not config:
        raise ValueError(f"no application {application!r} was deployed on this cluster: there are {list(applications)}")
    return dict(config)


def set_user_config(client: Client, application: str, names: list[str], user_config: dict[str, Any]) -> None:
    """Deploy all that is deployed, with this `user_config` for the deployments named: Serve then restarts nothing."""
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


def wait_until_running(client: Client, application: str, lasting_s: float = 0.0) -> None:
    """Until the application runs as it was last told to. Raises DeploymentFailedError, where it was said to have failed
    for `lasting_s` seconds."""
    ends, well = time.monotonic() + PATIENCE_S, time.monotonic()
    while True:
        running = details_of(client, application)
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
