"""`serve run CONFIG` serves by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import ROOT, free_port

from raexmc_ray.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def config(tiny_run: Recipe) -> dict:
    """The shipped local config, for the tiny memory and a free port."""
    content = yaml.safe_load((ROOT / "serve_configs/local.yaml").read_text())
    content["http_options"]["port"] = free_port()
    content["applications"][0]["args"] = {"memory": f"{tiny_run.cluster.storage}/memory"}
    return content


def serve_run(path: Path) -> subprocess.Popen[str]:
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "token"}
    command = [str(Path(sys.executable).parent / "serve"), "run", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


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
        reply = httpx.post(f"{url}/v1/predict", json={"texts": ["vim: an editor"], "k": 3}, timeout=60).json()
        assert len(reply["answers"][0]["labels"]) == 3
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
