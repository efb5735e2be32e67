"""Processes killed at random moments while files are scored or embedded: every row once, and the same to the last
byte. One round here; `make soak` runs twenty of each, and five of the node, which Ray takes half a minute to miss."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ROOT, Rounds
from helpers import Killer, tiny_encoder

from raexmc_ray.embed import COMPUTED_IN
from raexmc_ray.embed_files import EmbedJob, embed_files
from raexmc_ray.files import Folder
from raexmc_ray.inputs.job import Job
from raexmc_ray.local import override
from raexmc_ray.memory.snapshot import open_snapshot
from raexmc_ray.recipe import ClusterSection, EncoderSection
from raexmc_ray.score.run import ScoreJob, score

pytestmark = [pytest.mark.ray, pytest.mark.faults]
ROWS, PARTS, K, SHARDS = 10_000, 10, 5, 3


class Undisturbed(ABC):
    """Two files with rows that can be used and rows that cannot, and what comes of them when nothing is killed."""

    name: str
    job: type[Job]

    def __init__(self, folder: Path) -> None:
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        rng = np.random.default_rng(0)
        words = [f"w{number}" for number in range(3000)]
        texts = [" ".join(rng.choice(words, 4)) if row % 750 else None for row in range(ROWS)]
        half = ROWS // 2
        pq.write_table(
            pa.table({"id": [f"p{i}" for i in range(half)], "text": texts[:half]}), self.inputs / "a.parquet"
        )
        (self.inputs / "b.txt").write_text("".join(f"{text or ''}\n" for text in texts[half:]))
        started = time.monotonic()
        self.run(folder / "out")
        self.seconds = time.monotonic() - started
        self.contents = self.contents_of(folder / "out")
        assert len([name for name in self.contents if name.startswith(self.job.PARTS)]) == PARTS

    @abstractmethod
    def run(self, output: Path) -> None:
        """The job on two encoder actors, driven by this process."""

    @abstractmethod
    def arguments(self) -> list[str]:
        """Those of `raexmc` for the same, but for the output."""

    def command(self, output: Path) -> list[str]:
        return [sys.executable, "-m", "raexmc_ray.cli", *self.arguments(), "--output", str(output)]

    def contents_of(self, output: Path) -> dict[str, str]:
        """{part: sha256} of what the job computed; every row is there once."""
        found = {str(path.relative_to(output)): Folder.at(path).sha256() for path in sorted(output.rglob("*.parquet"))}
        rows = pq.read_table(output / self.job.PARTS)["id"].to_pylist()
        assert len(set(rows)) == len(rows)
        assert len(rows) + len(pq.read_table(output / "rejected")) == ROWS
        hidden = {path.name for path in output.rglob(".*")} - set(COMPUTED_IN.values())
        assert not hidden, "no half-written file is left by a run that ended"
        return found


class Scored(Undisturbed):
    name, job = "scoring", ScoreJob

    def __init__(self, memory: Path, folder: Path) -> None:
        self.memory = Folder.at(memory)
        super().__init__(folder)

    def run(self, output: Path) -> None:
        settings = override(open_snapshot(self.memory).manifest.defaults, k=K)
        score(self.memory, [str(self.inputs)], Folder.at(output), settings, ClusterSection(encoders=2))

    def arguments(self) -> list[str]:
        return ["score", self.memory.path, str(self.inputs), "--k", str(K)]


class Embedded(Undisturbed):
    name, job = "embedding_files", EmbedJob

    def __init__(self, folder: Path) -> None:
        self.encoder = str(folder / "encoder")
        tiny_encoder().save(self.encoder)
        super().__init__(folder)

    def run(self, output: Path) -> None:
        embed_files([str(self.inputs)], Folder.at(output), self.encoder, EncoderSection(), ClusterSection(encoders=2))

    def arguments(self) -> list[str]:
        return ["embed", str(self.inputs), "--encoder", self.encoder]


@pytest.fixture(scope="module")
def scored(ray_cluster: str, small_memory: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return Scored(small_memory, tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def embedded(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    return Embedded(tmp_path_factory.mktemp("embedded"))


@pytest.fixture
def undisturbed(request: pytest.FixtureRequest) -> Undisturbed:
    """That of the parameter, which is the fixture's name."""
    undisturbed: Undisturbed = request.getfixturevalue(request.param)
    return undisturbed


ACTORS = [("scored", "_UnitScorer"), ("scored", "ShardActor"), ("embedded", "_FileEncoder")]


@pytest.mark.parametrize(("undisturbed", "actor"), ACTORS, indirect=["undisturbed"])
def test_a_killed_actor(undisturbed: Undisturbed, tmp_path: Path, actor: str) -> None:
    with Rounds(f"{undisturbed.name}_{actor.strip('_')}") as rounds:
        for number in rounds:
            output = tmp_path / str(number)
            due = time.monotonic() + random.uniform(0, undisturbed.seconds)
            with Killer(actor, lambda due=due: time.monotonic() > due) as killer:
                undisturbed.run(output)
            if not killer.killed:
                rounds.again()
            assert undisturbed.contents_of(output) == undisturbed.contents


@pytest.mark.parametrize("undisturbed", ["scored", "embedded"], indirect=True)
def test_a_killed_driver(undisturbed: Undisturbed, tmp_path: Path) -> None:
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with Rounds(f"{undisturbed.name}_driver") as rounds:
        for number in rounds:
            output = tmp_path / str(number)
            command = undisturbed.command(output)
            driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while driver.poll() is None and not (output / "job.json").exists():  # until it begins
                time.sleep(0.01)
            time.sleep(random.uniform(0, undisturbed.seconds))
            if driver.poll() is not None:
                rounds.again()
            driver.kill()
            driver.wait()
            before = {part: part.stat().st_mtime_ns for part in output.rglob("part-*")}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            assert f" of {ROWS:,} rows, 14 rejected" in done.stdout
            assert undisturbed.contents_of(output) == undisturbed.contents
            after = {part: part.stat().st_mtime_ns for part in before}
            assert after == before, "what was there is not computed again"


def test_a_killed_node(scored: Scored, tmp_path: Path) -> None:
    """A cluster of its own, of a head and two nodes; one of the nodes dies with its encoders and its shards, another
    one joins."""
    with Rounds("scoring_node", soak=5) as rounds:
        for number in rounds:
            output = tmp_path / str(number)
            arguments = ["score", scored.memory.path, str(scored.inputs), str(output), str(K)]
            command = [sys.executable, str(ROOT / "tests/lose_a_node.py"), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=280)
            assert done.returncode == 0, done.stdout + done.stderr
            if "killed a node" not in done.stdout or "_UnitScorer" not in done.stdout:
                rounds.again()  # it must die with an encoder
            else:
                assert done.stdout.count("ShardActor") == SHARDS, "each node has all shards, for its encoders to share"
            assert scored.contents_of(output) == scored.contents
