"""Where another worker fails, Ray Train takes the group away from one that still trains: no step counts, and no
checkpoint is written, whose gradients were not summed over all. Real gloo groups, without Ray."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import tiny_settings
from ranks import run_ranks

from raexmc_ray.corpus import read_corpus
from raexmc_ray.files import Folder
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.gather import exchange, from_first, gather, is_torn, reduce_scatter, sum_over_ranks
from raexmc_ray.train.loop import Loop
from raexmc_ray.train.mining import Part, search
from raexmc_ray.train.trainer import training_data
from raexmc_ray.train.worker import make_encoder, would_come_again

TORN = "the group of the workers is gone"


def orphaned(rank: int, ranks: int, corpus: Path, folder: Path) -> dict[str, Any]:
    """How a run ends that loses its group in the backward pass of step 2, after which a checkpoint is due."""
    overrides = ["cluster.checkpoint_every=2", "training.precision=float32", "training.dropout=0"]
    recipe = Recipe.parse(tiny_settings(corpus, folder), overrides)
    encoder = make_encoder(recipe, torch.device("cpu"))
    loop = Loop(recipe, training_data(recipe, read_corpus(corpus), encoder), encoder, Folder.at(folder),
                lambda step, figures: None, rank, ranks)  # fmt: skip

    def take_away(gradient: torch.Tensor) -> torch.Tensor:
        if loop.state.step == 1 and dist.is_initialized():
            thread = threading.Thread(target=dist.destroy_process_group)  # as Ray Train's actor does
            thread.start()
            thread.join()
        return gradient

    list(encoder.parameters())[-1].register_hook(take_away)
    with pytest.raises(RuntimeError) as error:
        loop.run()
    loop.checkpoints.wait()
    again = would_come_again(error.value) is None
    return {"said": str(error.value), "again": again, "step": loop.state.step, "written": loop.checkpoints.steps()}


def test_a_run_that_loses_its_group_ends_before_the_step(tiny_corpus: Path, tmp_path: Path) -> None:
    for found in run_ranks(orphaned, 2, tmp_path, tiny_corpus, tmp_path / "run"):
        assert TORN in found["said"]
        assert found["again"], "another start is the remedy"
        assert (found["step"], found["written"]) == (1, [])


def test_nothing_passes_for_what_all_ranks_said_without_them() -> None:
    ones = torch.ones(2, 3)
    keys = Part(np.eye(3, dtype=np.float32), 0, 2, 6)
    calls = [
        lambda: gather(ones, 2),
        lambda: exchange(ones),
        lambda: reduce_scatter(ones, 2),
        lambda: sum_over_ranks([ones], 2),
        lambda: from_first(ones, 2),
        lambda: search(keys, keys, 2),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=TORN):
            call()
    assert torch.equal(gather(ones, 1), ones), "alone there is nobody to ask"
    assert (is_torn(2), is_torn(1)) == (True, False)
