"""An embedding job that cannot be done ends with what is wrong, and is not tried for ever."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import psutil
import pytest
import ray
import torch
from helpers import MODEL, write_tiny_corpus

from raexmc_ray.corpus import read_corpus
from raexmc_ray.embed import stage_encoder
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder
from raexmc_ray.memory.build import build
from raexmc_ray.recipe import Recipe

pytestmark = pytest.mark.ray


def test_a_text_whose_embedding_is_not_finite_is_named(ray_cluster: str, tmp_path: Path) -> None:
    encoder = TextEncoder.load(MODEL, layers=1, max_tokens=16)
    with torch.no_grad():
        encoder.words[encoder.tokenize(["2"]).ids[1]] = torch.nan  # the word "2"
    encoder.save(tmp_path / "encoder")
    corpus = write_tiny_corpus(tmp_path / "corpus")
    recipe = Recipe.parse({"corpus": {"path": str(corpus)}, "cluster": {"storage": str(tmp_path / "run")}})
    with pytest.raises(ValueError, match=r"^key 2 \('text number 2'\).*not finite, nor are 1 others"):
        build(recipe, read_corpus(corpus), Folder.at(tmp_path / "encoder"))
    assert not list(tmp_path.rglob("unit-*"))


@pytest.mark.faults
def test_an_actor_that_dies_each_time_ends_the_job(ray_cluster: str, tmp_path: Path) -> None:
    corpus = write_tiny_corpus(tmp_path / "corpus")
    settings = {
        "corpus": {"path": str(corpus)},
        "encoder": {"layers": 1},
        "cluster": {"storage": str(tmp_path / "run")},
    }
    recipe = Recipe.parse(settings)
    encoder, ended, killed = stage_encoder(Folder.at(tmp_path / "run"), MODEL, recipe.encoder), threading.Event(), set()

    def kill_each() -> None:
        while not ended.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "_UnitEncoder" in " ".join(process.cmdline()):
                        process.kill()
                        killed.add(process.pid)

    killer = threading.Thread(target=kill_each)
    killer.start()
    try:
        with pytest.raises(ray.exceptions.RayError):
            build(recipe, read_corpus(corpus), encoder)
    finally:
        ended.set()
        killer.join()
    assert len(killed) > 1, "it was tried again, but not for ever"
