"""What a training is about to do, and what cannot work, said before anything is started."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from typing import Any, cast

import torch

from raexmc_ray.cluster import refuse_unplaceable
from raexmc_ray.encoder import TextEncoder, bfloat16_is_native
from raexmc_ray.files import Folder
from raexmc_ray.objective import BLOCK_CELLS, BLOCK_QUERIES
from raexmc_ray.recipe import MiningSection, Recipe, TrainingSection
from raexmc_ray.train.mining import NEIGHBOURS_PER_GROUP_MEMBER

ADAM_BYTES = 16
"""A weight in float32, its gradient, and the two moments of AdamW."""
PROCESS_BYTES = 900 << 20
"""Python, torch and Ray in a process, and what malloc keeps: counted where the worker's memory is the machine's."""
logger = logging.getLogger("raexmc_ray")


@dataclass(frozen=True)
class Plan:
    """The size of a training. `str(plan)` is what people read."""

    recipe: Recipe
    instances: int
    steps_an_epoch: int
    parameters: int
    memory_bytes: int
    """Of a worker: see `worker_bytes`."""

    @property
    def steps(self) -> int:
        return self.recipe.training.epochs * self.steps_an_epoch

    def __str__(self) -> str:
        settings, cluster = self.recipe.training, self.recipe.cluster
        each = "1 GPU" if cluster.gpu else f"{cluster.cpus_per_worker:g} CPU"
        cached = ", gradient cache" if settings.gradient_cache else ""
        mined = [f"{settings.mining.batches} batches"] + [f"{settings.mining.labels} mined labels"] * (
            settings.mining.labels > 0
        )
        return "\n".join(
            (
                f"workers     {cluster.workers} with {each} each",
                f"batch       {settings.batch_size:,} instances over all workers, "
                f"{settings.batch_size // cluster.workers:,} a worker, chunks of {settings.chunk_size}{cached}",
                f"steps       {self.steps:,}: {settings.epochs} epochs of {self.steps_an_epoch:,}, "
                f"over {self.instances:,} instances that have a label",
                f"objective   {settings.objective.kind}, instances {settings.objective.instances}, {', '.join(mined)}",
                f"parameters  {self.parameters / 1e6:,.1f} million, {settings.precision} precision",
                f"memory      about {self.memory_bytes / 2**30:,.1f} GiB a worker",
            )
        )


def worker_bytes(encoder: TextEncoder, recipe: Recipe, instances: int, labels: int) -> int:
    """An estimate of what training on so many takes in a worker's memory (its GPU's, where it has one), in bytes.

    Weights, gradients and moments; the activations of the chunks that are alive, by Korthikanti et al., Reducing
    Activation Recomputation in Large Transformer Models (2022): s·b·h·(34 + 5·a·s/h) bytes a layer in 16 bits, twice
    that in 32; the embeddings of the whole batch with their gradients; the blocks of similarities; with more workers, a
    second copy of the gradients, to sum them. Or, in the place of what a batch takes, `embedded_bytes`, where that is
    more. On CPUs the process counts, too.
    """
    settings, config = recipe.training, cast(Any, encoder.model.config)
    hidden, layers, heads = encoder.width, int(config.num_hidden_layers), int(config.num_attention_heads)
    weights = sum(p.numel() for p in encoder.parameters())
    drawn = settings.batch_size * (settings.positives_per_instance + settings.mining.labels)
    texts = settings.batch_size + min(drawn, labels)  # a label is encoded once, whoever draws it
    alive = settings.chunk_size if settings.gradient_cache else -(-texts // recipe.cluster.workers)
    tokens = encoder.max_tokens
    gpu = recipe.cluster.gpu
    native = gpu or bfloat16_is_native(torch.device("cpu"))
    width = 1 if settings.precision == "bfloat16" or (settings.precision == "auto" and native) else 2
    weight_bytes = ADAM_BYTES + 4 * (recipe.cluster.workers > 1)
    process = 0 if gpu else PROCESS_BYTES
    activations = layers * tokens * alive * hidden * (34 + 5 * heads * tokens // hidden) * width
    similarities = 12 * 4 * max(BLOCK_CELLS, BLOCK_QUERIES * texts)
    batch = activations + texts * hidden * 4 * 4 + similarities
    return process + weights * weight_bytes + max(batch, embedded_bytes(recipe, hidden, instances, labels))


def embedded_bytes(recipe: Recipe, width: int, instances: int, labels: int) -> int:
    """What a worker holds while it mines or evaluates: the embeddings of its part of the keys and an index of them, and
    of all instances the rows that mining found, once more while they are gathered."""
    mining, evaluates = recipe.training.mining, recipe.training.evaluation.every > 0
    if not (mining.on or evaluates):
        return 0
    keys = instances + labels * (evaluates or mining.labels > 0)
    found = mining.depth * (mining.labels > 0)
    if mining.batches == "neighbours":
        found += 1 + NEIGHBOURS_PER_GROUP_MEMBER * mining.group
    return 2 * (-(-keys // recipe.cluster.workers) * width * 4 + instances * found * 4)


def idle_settings(mining: MiningSection) -> dict[str, str]:
    """The settings that do nothing beside the others, and why."""
    needed = {
        "group": (mining.batches == "neighbours", "batches is random"),
        "depth": (mining.labels > 0, "labels is 0"),
        "every": (mining.on, "batches is random and labels is 0"),
    }
    return {name: why for name, (used, why) in needed.items() if not used}


def warn_of_idle(training: TrainingSection) -> None:
    """Log which settings were changed that do nothing beside the others."""
    evaluation = {} if training.evaluation.every else dict.fromkeys(("holdout", "metric"), "every is 0")
    idle = {"mining": idle_settings(training.mining), "evaluation": evaluation}
    for section, reasons in idle.items():
        settings, place = getattr(training, section), f"training.{section}"
        for name, why in reasons.items():
            value = getattr(settings, name)
            if value != type(settings).model_fields[name].default:
                logger.warning("%s.%s is %s, and does nothing: %s.%s", place, name, value, place, why)


def refuse(recipe: Recipe, labelled: int) -> None:
    """Raise ValueError, with the remedy, for what cannot work on this cluster: before anything is started.

    What a recipe cannot be in itself is refused when it is read.
    """
    settings = recipe.training
    if labelled < settings.batch_size:
        held_out = " and are not held out for training.evaluation" if settings.evaluation.every else ""
        remedy = "make the batch smaller"
        if labelled < 2:  # no batch is so small
            remedy = "give the corpus more, or build the memory over a pretrained encoder (raexmc build --encoder)"
        raise ValueError(
            f"training.batch_size is {settings.batch_size}, but only {labelled} training instances have a label"
            f"{held_out}: {remedy}"
        )
    _refuse_storage(Folder.at(recipe.cluster.storage))
    cluster = recipe.cluster
    each = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.gpu else {})
    without_gpu = ", set cluster.gpu=false" if cluster.gpu else ""
    remedy = f"lower cluster.workers or cluster.cpus_per_worker{without_gpu}"
    refuse_unplaceable("a training worker", each, remedy, cluster.workers)


def _refuse_storage(storage: Folder) -> None:
    if not storage.is_local:
        raise ValueError(
            f"cluster.storage is {storage}, and training keeps its checkpoints in a folder: set it to one that "
            "every node sees"
        )
    probe = storage / f".writable-{uuid.uuid4().hex}"
    try:
        probe.write(b"")
        probe.filesystem.delete_file(probe.path)
    except OSError as error:
        raise ValueError(
            f"cluster.storage is {storage}, and it cannot be written to ({error}): set it to a folder that every "
            "node can write to"
        ) from None
