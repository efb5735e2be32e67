"""One local Ray cluster and one tiny run (corpus, encoder, memory) for all tests that need them."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from raexmc_ray.recipe import Recipe

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "examples/debian-related"
TRAIN_ROWS, TEST_ROWS = 240, 40


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    """An encoder that encodes in threads of its own leaves torch with one for each operation, in the whole process."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _head(name: str, rows: int) -> list[dict]:
    with gzip.open(CORPUS / name, "rt", encoding="utf-8") as file:
        return [json.loads(next(file)) for _ in range(rows)]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of the shipped corpus, with the labels that they have, in the LF-XMC layout."""
    folder = tmp_path_factory.mktemp("corpus")
    train, test = _head("trn.json.gz", TRAIN_ROWS), _head("tst.json.gz", TEST_ROWS)
    kept = sorted({label for row in train + test for label in row["target_ind"]})
    place = {label: i for i, label in enumerate(kept)}
    with gzip.open(CORPUS / "lbl.json.gz", "rt", encoding="utf-8") as file:
        labels = [line for i, line in enumerate(file) if i in place]
    (folder / "lbl.json").write_text("".join(labels), encoding="utf-8")
    for name, rows in (("trn.json", train), ("tst.json", test)):
        for row in rows:
            row["target_ind"] = [place[label] for label in row["target_ind"]]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def tiny_settings(corpus: Path, storage: Path, workers: int = 2) -> dict:
    """A recipe that trains in seconds on the CPU."""
    return {
        "corpus": {"path": str(corpus)},
        "encoder": {"layers": 1, "max_tokens": 16},
        "training": {"epochs": 2, "batch_size": 32, "learning_rate": 5e-4},
        "memory": {"shards": 3},
        "prediction": {"temperature": 0.08, "neighbours": {"joint": 100}},
        "cluster": {"storage": str(storage), "workers": workers, "encoders": 2},
    }


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The dashboard's address of a local cluster with four CPUs, which serves as that of `raexmc serve` does."""
    import ray
    import ray.serve  # reads its settings for this process, which are others than the cluster's

    from raexmc_ray.serve.environment import ENVIRONMENT

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        context = ray.init("local", num_cpus=4, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_run(ray_cluster: str, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A trained encoder and a memory of three shards, made by Ray Train and Ray Data."""
    from raexmc_ray.corpus import read_corpus
    from raexmc_ray.memory.build import build
    from raexmc_ray.train.trainer import train

    recipe = Recipe.parse(tiny_settings(tiny_corpus, tmp_path_factory.mktemp("run")))
    corpus = read_corpus(recipe.corpus.path)
    build(recipe, corpus, train(recipe, corpus))
    return recipe


@pytest.fixture(scope="session")
def small_memory(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory of three shards over the tiny corpus and an encoder of one layer, made in this process."""
    from helpers import tiny_encoder

    import raexmc_ray
    from raexmc_ray.corpus import read_corpus
    from raexmc_ray.recipe import MemorySection

    folder = tmp_path_factory.mktemp("small") / "memory"
    raexmc_ray.build(read_corpus(tiny_corpus), tiny_encoder(), folder, MemorySection(shards=3))
    return folder


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on: of those that neither the system nor Ray gives away by itself, so
    that it is free still when a server takes it, seconds later."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port from 20,000 to 32,000 is free")


@pytest.fixture(scope="module")
def served(tiny_run: Recipe) -> Iterator[str]:
    """The URL of the application, which answers from the tiny memory."""
    from raexmc_ray.serve.run import serving
    from raexmc_ray.serve.schema import ServeSettings

    with serving(ServeSettings(memory=f"{tiny_run.cluster.storage}/memory"), port=free_port()) as url:
        yield url


@pytest.fixture(scope="session")
def tiny_texts(tiny_corpus: Path) -> list[str]:
    """Texts of the test part."""
    from raexmc_ray.corpus import read_corpus

    return read_corpus(tiny_corpus).test.texts["text"].to_pylist()


class Rounds:
    """The rounds of a test that leaves something to chance: `short`, or with RAEXMC_SOAK=1 `soak` of them, of which a
    result is left: how many held until one did not. A context manager, to be iterated once within.

    A round counts unless it says `again`, because it killed nobody.
    """

    def __init__(self, name: str, short: int = 1, soak: int = 20) -> None:
        self._name, self._soak = name, soak if os.environ.get("RAEXMC_SOAK") == "1" else 0
        self._rounds, self._missed, self._begun = self._soak or short, 0, 0

    def again(self) -> None:
        self._missed += 1
        assert self._missed < self._rounds + 2, "the test must kill"

    def __iter__(self) -> Iterator[int]:
        number = 0
        while number < self._rounds + self._missed:
            self._begun = number + 1
            yield number
            number += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._soak:
            sys.path.insert(0, str(ROOT / "benchmarks"))
            from _result import at_least, write_result

            held = self._begun - self._missed - (error is not None)
            figures = {"rounds": held, "rounds_that_killed_nobody": self._missed}
            targets = [at_least("rounds that held", held, self._soak)]
            write_result(f"soak_{self._name}", figures, targets)
