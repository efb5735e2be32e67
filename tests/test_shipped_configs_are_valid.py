"""cluster.yaml and the Serve configs are what Ray's own schemas ask for."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from conftest import ROOT
from pydantic import ValidationError
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from raexmc_ray.serve.app import build_app
from raexmc_ray.serve.environment import ENVIRONMENT
from raexmc_ray.serve.gate import REQUESTS
from raexmc_ray.serve.schema import ServeSettings


def test_cluster_yaml() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("path", sorted((ROOT / "serve_configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_serve_configs(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    if content.get("kind") == "RayService":
        cluster = content["spec"]["rayClusterConfig"]
        assert cluster["rayVersion"] == ray.__version__
        assert cluster["authOptions"] == {"mode": "token"}, "Ray's own ports take no orders from other pods"
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            (container,) = group["template"]["spec"]["containers"]
            assert ENVIRONMENT.items() <= {one["name"]: one["value"] for one in container["env"]}.items()
        groups = cluster["workerGroupSpecs"]
        grows = any(group["maxReplicas"] > group["replicas"] for group in groups)
        assert cluster.get("enableInTreeAutoscaling", False) == grows
        gate = next(int(one["value"]) for one in container["env"] if one["name"] == REQUESTS)
        at_the_doors = gate * (1 + sum(group["maxReplicas"] for group in groups))
        content = yaml.safe_load(content["spec"]["serveConfigV2"])
        settings = ServeSettings.model_validate(content["applications"][0]["args"])
        assert at_the_doors <= settings.ingress_replicas * settings.limits.concurrent_requests, "nothing queues"
    config = ServeDeploySchema.model_validate(content)
    (application,) = config.applications
    # An application's own is all that its replicas know: nothing of the cluster's comes beside it.
    logs = application.logging_config
    assert logs
    assert not logs.enable_access_log, "a line for each call between deployments"
    assert not content.get("logging_config") or logs.encoding == config.logging_config.encoding == "JSON"
    settings = ServeSettings.model_validate(application.args)
    guarded = settings.tokens_file is not None
    assert guarded or config.http_options.host == "127.0.0.1", "what no token guards stays on loopback"
    assert config.http_options.keep_alive_timeout_s > 600, "a load balancer gives up an idle connection first"


def test_no_deployment_hides_how_its_application_logs(small_memory: Path) -> None:
    """Serve gives an application's `logging_config` to those of its deployments that have none."""
    application = build_app(ServeSettings(memory=str(small_memory)))
    ingress = application._bound_deployment
    others = [argument._bound_deployment for argument in ingress.init_args if isinstance(argument, Application)]
    assert len(others) == 1 + 3, "the encoder, and the shards"
    assert {deployment._deployment_config.logging_config for deployment in (ingress, *others)} == {None}


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValidationError, match="memroy"):
        ServeSettings.model_validate({"memory": "x", "memroy": "y"})
