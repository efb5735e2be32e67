"""`serve run CONFIG` serves by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from conftest import ROOT, free_port

from raexmc_ray.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def config(tiny_run: Recipe) -> dict:
    """The shipped local config, for the tiny memory and a free port, with the logs of the cluster's."""
    content = yaml.safe_load((ROOT / "serve_configs/local.yaml").read_text())
    content["http_options"]["port"] = free_port()
    logs = yaml.safe_load((ROOT / "serve_configs/cluster.yaml").read_text())["applications"][0]["logging_config"]
    content["applications"][0] |= {"name": "shipped", "logging_config": logs}  # others' logs lie beside it
    content["applications"][0]["args"] = {"memory": f"{tiny_run.cluster.storage}/memory"}
    return content


def serve_run(path: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "token"}
    command = [str(Path(sys.executable).parent / "serve"), "run", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def logged(deployment: str, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The wanted lines of a deployment's logs, each of which is a JSON object."""
    files = Path(ray._private.worker._global_node.get_logs_dir_path()).glob(f"serve/replica_shipped_{deployment}_*.log")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if wanted(line)]


def test_the_shipped_config_serves(config: dict, tmp_path: Path) -> None:
    path = tmp_path / "local.yaml"
    path.write_text(yaml.safe_dump(config))
    server = serve_run(path)
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, server.communicate()[0]
            assert time.monotonic() < deadline, "it did not become ready"
            try:
                if httpx.get(f"{url}/v1/ready", timeout=30).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        body = {"texts": ["vim: an editor"], "k": 3}
        reply = httpx.post(f"{url}/v1/predict", json=body, headers={"x-request-id": "followed"}, timeout=60).json()
        assert len(reply["answers"][0]["labels"]) == 3
        ends, found = time.monotonic() + 10, []
        while len(found) < 2 and time.monotonic() < ends:  # a batch is logged after its requests are answered
            found = logged("Ingress", lambda line: "followed" in (line.get("request"), *line.get("requests", [])))
        request, batch = sorted(found, key=lambda line: "requests" in line)
        assert (request["status"], request["texts"], request["deployment"]) == (200, 1, "shipped_Ingress")
        assert request["batch"] == batch["batch"]
        assert batch["shards"].keys() == {"0", "1", "2"}
        assert not logged("Encoder", lambda line: "CALL" in line["message"]), "Serve's own line of each call"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
