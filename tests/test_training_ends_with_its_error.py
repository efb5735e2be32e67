"""What would come again ends a training at once, in one line with the remedy; what may be better luck is tried again as
often as is set, and then said in one line."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from conftest import tiny_settings

from raexmc_ray.corpus import read_corpus
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.errors import WorkersFailedError
from raexmc_ray.train.published import DONE
from raexmc_ray.train.trainer import train
from raexmc_ray.train.watch import ProgressActor
from raexmc_ray.train.worker import would_come_again


class InductorError(RuntimeError):
    """As torch.compile's, which has its cause in its first line, and cannot be pickled."""

    __module__ = "torch._inductor.exc"


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), ValueError, r"\(CUDA out of memory\.\): lower"),
        (MemoryError(), ValueError, r"into a worker's memory \(MemoryError\): .*training\.gradient_cache=true"),
        (RuntimeError("Error in void* faiss::gpu::allocMemory: StandardGpuResources: alloc fail type FlatData dev 0 "
         "(cudaMalloc error out of memory [2])\n"), ValueError, r"mining or evaluating, lower encoder\.batch_size"),
        (InductorError("No working C++ compiler\n"), ValueError, r"\(No working C\+\+ compiler\): .*compile=false"),
        (FileNotFoundError(2, "No such file", "/a/b"), FileNotFoundError, "No such file.*/a/b"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "broken"), ValueError, "broken"),
        (RuntimeError("Connection closed by peer"), None, ""),
        (OSError("Stale file handle"), None, ""),
    ],
)  # fmt: skip
def test_what_would_come_again_is_known(error: Exception, kind: type[Exception] | None, says: str) -> None:
    found = would_come_again(error)
    if kind is None:
        assert found is None
        return
    assert type(found) is kind
    with pytest.raises(kind, match=says):
        raise pickle.loads(pickle.dumps(found))


def test_torch_out_of_memory_on_a_cpu_would_come_again() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "lower training.chunk_size" in str(would_come_again(error.value))


def failing(error: Exception, rank: int, starts: Path) -> Callable[[dict[str, Any]], None]:
    """A `train_worker` that raises this in the worker of this rank while others wait for it, and counts its starts."""

    def worker(config: dict[str, Any]) -> None:
        from unittest import mock

        import ray.train

        from raexmc_ray.train import worker

        def fail(*_: Any) -> None:
            with starts.open("a") as file:
                file.write("start\n")
            raise error

        if ray.train.get_context().get_world_rank() != rank:
            return worker.train_worker(config)
        with mock.patch.object(worker, "make_encoder", fail):
            return worker.train_worker(config)

    return worker


@pytest.mark.ray
@pytest.mark.parametrize(
    ("error", "rank", "starts", "kind", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), 1, 1, ValueError, r"memory\.\): lower training\.chunk_size"),
        (RuntimeError("bad luck\nand more"), 0, 2, WorkersFailedError, r"max_failures is 1, and worker 0 failed "
         r"\(RuntimeError: bad luck\)\. The same command goes on from the last checkpoint$"),
    ],
)  # fmt: skip
def test_a_worker_that_fails_ends_in_one_line(
    error: Exception,
    rank: int,
    starts: int,
    kind: type[Exception],
    says: str,
    ray_cluster: str,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raexmc_ray.train.trainer.train_worker", failing(error, rank, tmp_path / "starts"))
    recipe = Recipe.parse(tiny_settings(tiny_corpus, tmp_path / "run"), ["cluster.max_failures=1"])
    with pytest.raises(kind, match=says) as raised:
        train(recipe, read_corpus(recipe.corpus.path))
    assert "\n" not in str(raised.value)
    assert (tmp_path / "starts").read_text().count("start") == starts


def torn(error: Exception, starts: Path) -> Callable[[dict[str, Any]], None]:
    """A `train_worker` whose first rank loses its group, and raises this, in its first start."""

    def worker(config: dict[str, Any]) -> None:
        from unittest import mock

        import ray.train
        import torch.distributed as dist

        from raexmc_ray.train import worker

        make_encoder = worker.make_encoder

        def tear(*arguments: Any) -> Any:
            first = not starts.exists()
            with starts.open("a") as file:
                file.write("start\n")
            if first:
                dist.destroy_process_group()
                raise error
            return make_encoder(*arguments)

        if ray.train.get_context().get_world_rank() != 0:
            return worker.train_worker(config)
        with mock.patch.object(worker, "make_encoder", tear):
            return worker.train_worker(config)

    return worker


@pytest.mark.ray
def test_what_a_worker_meets_without_its_group_ends_nothing(
    ray_cluster: str, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ValueError("Default process group has not been initialized")
    monkeypatch.setattr("raexmc_ray.train.trainer.train_worker", torn(error, tmp_path / "starts"))
    overrides = ["cluster.max_failures=1", "training.epochs=1"]
    recipe = Recipe.parse(tiny_settings(tiny_corpus, tmp_path / "run"), overrides)
    assert (train(recipe, read_corpus(recipe.corpus.path)) / DONE).size(), "it was trained"
    assert (tmp_path / "starts").read_text().count("start") == 2


@pytest.mark.ray
def test_what_was_said_too_late_to_end_a_start_does_not_end_the_next(ray_cluster: str) -> None:
    progress = ProgressActor.remote()  # type: ignore[attr-defined]
    for error in (ValueError("of the first start"), ValueError("of the second")):
        ray.get(progress.begin.remote())
        assert ray.get(progress.fail.remote("worker 1 failed")) is None
        ray.get(progress.stop.remote(error))
    assert str(ray.get(progress.fail.remote("worker 0 failed"))) == "of the second"
    ray.kill(progress)
