"""What each training worker runs: steps, a checkpoint at each epoch, and going on from the last one."""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file

from raexmc_ray.encoder import TextEncoder, Tokens, bfloat16_is_native
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.sampler import Sampler
from raexmc_ray.train.step import batch_loss, learning_rate, make_optimizer

OPTIMIZER, STATE, ENCODER = "optimizer.safetensors", "state.json", "encoder"
REPORT_EVERY_S = 1.0


def train_worker(config: dict[str, Any]) -> None:
    """The training loop of one worker.

    config: `recipe` (settings), `arrays` (an object reference to the corpus as flat arrays, which all workers
    of a node read from shared memory), `progress` (handle of a ProgressActor).
    """
    recipe = Recipe.parse(config["recipe"])
    settings = recipe.training
    arrays = ray.get(config["arrays"])
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(recipe.cluster.cpus_per_worker)))

    relevance = sp.csr_matrix((np.ones(len(arrays["indices"]), np.float32), arrays["indices"], arrays["indptr"]))
    relevance.resize(arrays["shape"])
    instances = Tokens(arrays["instance_ids"], arrays["instance_offsets"])
    labels = Tokens(arrays["label_ids"], arrays["label_offsets"])
    sampler = Sampler(relevance, settings.batch_size, settings.positives_per_instance, settings.seed)

    checkpoint = ray.train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else tempfile.TemporaryDirectory() as saved:
        encoder = TextEncoder.load(
            str(Path(saved) / ENCODER) if checkpoint else recipe.encoder.model,
            layers=None if checkpoint else recipe.encoder.layers,
            max_tokens=recipe.encoder.max_tokens,
        )
        encoder.compute_dtype = _precision(settings.precision, device)
        encoder.set_dropout(settings.dropout)
        tower = ray.train.torch.prepare_model(encoder.train())
        optimizer = make_optimizer(tower, settings)
        first_epoch = _restore(Path(saved), optimizer) if checkpoint else 0

    steps = settings.epochs * sampler.steps
    reported = 0.0
    for epoch in range(first_epoch, settings.epochs):
        losses = []
        for step in range(sampler.steps):
            done = epoch * sampler.steps + step
            rate = learning_rate(settings, done, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # Dropout's randomness follows from the place in the run, so that a run that goes on replays it.
            torch.manual_seed(int(np.random.SeedSequence([settings.seed, epoch, step, rank]).generate_state(1)[0]))
            batch = sampler.batch(epoch, step)
            loss = batch_loss(tower, batch, instances, labels, settings, rank, ranks)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"the loss is {loss.item()} in epoch {epoch + 1}, step {step + 1}, rows {batch.rows_B.tolist()}: "
                    "no checkpoint was written from it; lower training.learning_rate"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if rank == 0 and (time.monotonic() - reported > REPORT_EVERY_S or step + 1 == sampler.steps):
                reported = time.monotonic()
                config["progress"].update.remote(done + 1, losses[-1], rate)
        metrics = {"epoch": epoch + 1, "loss": float(np.mean(losses)), "learning_rate": rate}
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                _save(Path(folder), encoder, optimizer, epoch + 1)
            ray.train.report(metrics, ray.train.Checkpoint.from_directory(folder) if rank == 0 else None)


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if bfloat16_is_native(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _save(folder: Path, encoder: TextEncoder, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    """A whole checkpoint after so many epochs: safetensors and JSON, nothing pickled."""
    encoder.save(folder / ENCODER)
    state = optimizer.state_dict()["state"]
    tensors = {f"{i}.{name}": value for i, values in state.items() for name, value in values.items()}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps({"epochs": epochs}))


def _restore(folder: Path, optimizer: torch.optim.Optimizer) -> int:
    """Load the optimiser's state; returns the number of epochs that are done."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / OPTIMIZER).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(json.loads((folder / STATE).read_text())["epochs"])
