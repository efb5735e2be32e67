"""`ray job submit` runs the same things on a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_training_is_submitted_to_a_cluster(ray_cluster: str, tiny_corpus: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_corpus, tmp_path / "run", workers=1)
    settings["training"]["epochs"] = 1
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = [
        str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", ray_cluster, "--",
        sys.executable, str(ROOT / "jobs/train.py"), "--recipe", str(recipe),
    ]  # fmt: skip
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert list((tmp_path / "run/encoders").glob("*/trained.json"))


@pytest.mark.parametrize("job", ["train", "build", "embed", "evaluate", "tune", "score"])
def test_jobs_explain_themselves(job: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / f"jobs/{job}.py"), "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "--" in done.stdout


def test_a_job_says_a_mistake_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs/train.py"), "--recipe", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no recipe at")
    assert "Traceback" not in done.stderr
