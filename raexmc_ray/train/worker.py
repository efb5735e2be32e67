"""What each training worker of Ray Train runs: the loop, on what the driver put into shared memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import scipy.sparse as sp
import torch

from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder
from raexmc_ray.recipe import Recipe
from raexmc_ray.tokens import Tokens
from raexmc_ray.train.gather import is_torn, sum_over_ranks
from raexmc_ray.train.loop import Loop, NonFiniteLossError, TrainingData
from raexmc_ray.train.validate import HeldOut

REPORT_EVERY_S = 1.0
MARK = "driver"
"""File in a run's folder by which a worker knows that it is the driver's."""
NO_MEMORY = ("can't allocate memory", "alloc fail", "cudaMalloc")
"""Parts of a plain RuntimeError that says so: torch's on a CPU, FAISS's on a GPU."""
MARK_S = 10.0
"""For what the driver wrote to be seen on another node."""


def train_worker(config: dict[str, Any]) -> None:
    """The training of one worker. What would end it again is told to `progress`, so that nothing is tried again.

    config: `recipe` (settings), `data` (an object reference to flat arrays, which all workers of a node read from
    shared memory without a copy), `folder` (of the run), `mark` (what the driver left there), `progress` (handle of a
    ProgressActor).
    """
    try:
        _train(Recipe.parse(config["recipe"]), config)
    except Exception as error:
        final = would_come_again(error)
        # Where the group was taken away, for another worker failed, whatever this one met may follow from that.
        if final is None or is_torn(ray.train.get_context().get_world_size()):
            raise
        ray.get(config["progress"].stop.remote(final))
        # Raised, for the others may wait for this one: Ray Train ends them.
        raise final from None


def would_come_again(error: Exception) -> Exception | None:
    """What people are told where the next start would end in this error, too; None where it may be better luck.

    Made anew, for it travels between processes, which not every error does.
    """
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if any(words in said for words in NO_MEMORY) or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return ValueError(
            f"the training does not fit into a worker's memory ({said}): lower training.chunk_size, or set "
            "training.gradient_cache=true, or lower training.batch_size; where it was mining or evaluating, lower "
            "encoder.batch_size, training.mining.depth or prediction.neighbours"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):  # to import them takes seconds
        return ValueError(
            f"training.compile is true, and the encoder cannot be compiled ({said}): install a C++ compiler on every "
            "node, or set training.compile=false"
        )
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(str(error))
    return ValueError(str(error)) if isinstance(error, ValueError) else None


def _train(recipe: Recipe, config: dict[str, Any]) -> None:
    progress = config["progress"]
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    if rank == 0:
        ray.get(progress.begin.remote())  # before any rank is past the first sum, and may say what ends the run
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(recipe.cluster.cpus_per_worker)))
    report = Reporter(progress.update.remote if rank == 0 else lambda *_: None)
    folder = Folder.at(config["folder"])
    strangers = count_strangers(folder / MARK, config["mark"], device, ranks)
    if strangers:
        if rank == 0:
            said = f"{strangers} of {ranks} workers do not see what the driver wrote into {folder}"
            error = ValueError(f"{said}: set cluster.storage to a folder that every node sees")
            ray.get(progress.stop.remote(error))
        return
    encoder = make_encoder(recipe, device)
    data = unflatten(ray.get(config["data"]))
    loop = Loop(recipe, data, encoder, folder, report, rank, ranks)
    try:
        state = loop.run()
    except NonFiniteLossError as error:
        # Not raised here: Ray Train would start again, from the same checkpoint into the same loss.
        if rank == 0:
            ray.get(progress.stop.remote(error))
        return
    if rank == 0:
        ray.get(progress.update.remote(state.step, report.untold))


class Reporter:
    """Tells how far a run is, and of steps that follow one another fast not of each. `untold`: the figures since."""

    def __init__(self, tell: Callable[[int, dict[str, float]], object]) -> None:
        self._tell, self._told = tell, 0.0
        self.untold: dict[str, float] = {}

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        """So many steps are done."""
        self.untold |= figures
        if "loss" not in figures or time.monotonic() - self._told > REPORT_EVERY_S:
            self._told, told, self.untold = time.monotonic(), self.untold, {}
            self._tell(step, told)


def count_strangers(mark: Folder, content: str, device: torch.device, ranks: int) -> int:
    """How many of all ranks do not find this content at `mark`: the same on every rank."""
    ends = time.monotonic() + MARK_S
    while not (seen := mark.size() is not None and mark.read() == content.encode()) and time.monotonic() < ends:
        time.sleep(0.5)
    strangers = torch.tensor(float(not seen), device=device)
    sum_over_ranks([strangers], ranks)
    return int(strangers)


def make_encoder(recipe: Recipe, device: torch.device) -> TextEncoder:
    """The encoder that a new run of `recipe` starts from, on `device`; what it computes in is for the loop to say."""
    settings = recipe.training
    encoder = TextEncoder.load(recipe.encoder.model, layers=recipe.encoder.layers, max_tokens=recipe.encoder.max_tokens)
    encoder.lexical = None  # of another memory, where the model is one's encoder
    encoder.to(device)
    encoder.set_dropout(settings.dropout)
    if settings.compile:
        encoder.compile_tower()
    return encoder


def flatten(data: TrainingData) -> dict[str, Any]:
    """`data` as arrays by name, which Ray shares between the processes of a node without a copy."""
    arrays = {"uids": data.uids} | _flatten_tokens("instances", data.instances) | _flatten_tokens("labels", data.labels)
    arrays |= _flatten_matrix("relevance", data.relevance)
    if data.held_out is not None:
        arrays |= _flatten_tokens("held_out", data.held_out.tokens)
        arrays |= _flatten_matrix("held_out_relevance", data.held_out.relevance)
        arrays |= _flatten_matrix("held_out_filtered", data.held_out.filtered)
        arrays["inverse_propensity"] = data.held_out.inverse_propensity_L
    return arrays


def unflatten(arrays: dict[str, Any]) -> TrainingData:
    """What `flatten` took apart, as views."""

    def tokens(name: str) -> Tokens:
        return Tokens(arrays[f"{name}.ids"], arrays[f"{name}.offsets"])

    def matrix(name: str) -> sp.csr_matrix:
        indices, indptr = arrays[f"{name}.indices"], arrays[f"{name}.indptr"]
        shape = tuple(arrays[f"{name}.shape"].tolist())
        return sp.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), shape=shape)

    held_out = None
    if "held_out.ids" in arrays:
        matrices = matrix("held_out_relevance"), matrix("held_out_filtered")
        held_out = HeldOut(tokens("held_out"), *matrices, arrays["inverse_propensity"])
    return TrainingData(arrays["uids"], tokens("instances"), tokens("labels"), matrix("relevance"), held_out)


def _flatten_tokens(name: str, tokens: Tokens) -> dict[str, np.ndarray]:
    return {f"{name}.ids": tokens.ids, f"{name}.offsets": tokens.offsets}


def _flatten_matrix(name: str, matrix: sp.csr_matrix) -> dict[str, np.ndarray]:
    return {
        f"{name}.indices": matrix.indices,
        f"{name}.indptr": matrix.indptr,
        f"{name}.shape": np.array(matrix.shape, np.int64),
    }
