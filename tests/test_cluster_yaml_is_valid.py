"""`cluster.yaml` is what Ray's cluster launcher takes, and agrees with the rest of the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def test_it_fits_the_schema_of_the_installed_ray(config: dict) -> None:
    schema = Path(ray.__file__).parent / "autoscaler/ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text(encoding="utf-8")))


def test_its_head_is_one_of_its_node_types(config: dict) -> None:
    assert config["head_node_type"] in config["available_node_types"]


def test_what_it_sends_to_the_nodes_exists(config: dict) -> None:
    missing = [path for path in config["file_mounts"].values() if not (ROOT / path).exists()]
    assert not missing


def test_its_images_have_the_ray_of_the_constraints(config: dict) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned
    for image in (config["docker"]["head_image"], config["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{pinned[1]}-")
