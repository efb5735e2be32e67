"""On a cluster that runs already it is its own tokens that guard the application, and not the caller's."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import ray
from conftest import free_port

from raexmc_ray.recipe import Recipe
from raexmc_ray.serve.errors import DeploymentFailedError
from raexmc_ray.serve.run import serving
from raexmc_ray.serve.schema import ServeSettings

pytestmark = pytest.mark.ray
TOKEN = "a-token-of-this-shell-0123"


@pytest.fixture
def settings(tiny_run: Recipe, monkeypatch: pytest.MonkeyPatch) -> ServeSettings:
    """For the running cluster, as a user's shell names it."""
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    return ServeSettings(memory=f"{tiny_run.cluster.storage}/memory")


def test_tokens_of_the_callers_shell_are_refused(settings: ServeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAEXMC_TOKENS", TOKEN)
    for host in ("0.0.0.0", "127.0.0.1"):
        refused = pytest.raises(ValueError, match=r"set tokens_file .* or set RAEXMC_TOKENS where the cluster starts")
        with refused, serving(settings, host=host, port=free_port()):
            pytest.fail("it served")


def test_a_relative_file_of_tokens_counts_from_here(
    settings: ServeSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text(TOKEN)
    monkeypatch.chdir(tmp_path)
    with serving(settings.model_copy(update={"tokens_file": "tokens"}), port=free_port()) as url:
        assert httpx.get(f"{url}/v1/memory", timeout=30).status_code == 401
        headers = {"authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{url}/v1/memory", headers=headers, timeout=30).status_code == 200


@pytest.mark.slow
def test_an_open_door_is_the_replicas_to_refuse(settings: ServeSettings) -> None:
    refused = pytest.raises(DeploymentFailedError, match=r"set tokens_file .*where the cluster starts.* RAEXMC_TOKENS")
    with refused, serving(settings, host="0.0.0.0", port=free_port()):
        pytest.fail("it served")
