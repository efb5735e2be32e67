"""Ray: the driver's side of training: check, plan, tokenise, start the workers, follow them, publish the encoder."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
from filelock import FileLock, Timeout
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raexmc_ray.cluster import KEEP_FREED_MEMORY
from raexmc_ray.corpus import Corpus
from raexmc_ray.embed import stage
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder
from raexmc_ray.metrics import inverse_propensity
from raexmc_ray.recipe import EncoderSection, EvaluationSection, MiningSection, PredictionSection, Recipe
from raexmc_ray.train.checkpoint import Checkpoint, Checkpoints
from raexmc_ray.train.curves import PICTURE, draw_curves, read_curves
from raexmc_ray.train.loop import TrainingData
from raexmc_ray.train.plan import Plan, idle_settings, refuse, warn_of_idle, worker_bytes
from raexmc_ray.train.published import DONE
from raexmc_ray.train.tokens import tokenize_on_cluster
from raexmc_ray.train.validate import HeldOut
from raexmc_ray.train.watch import Failures, ProgressActor, Watcher, workers_failed
from raexmc_ray.train.worker import MARK, flatten, train_worker

LOCK = "lock"
MODEL_FILES = {".json", ".safetensors", ".txt", ".model"}
"""What config, weights and tokenizer of a model are in, by suffix."""
logger = logging.getLogger("raexmc_ray")


def train(recipe: Recipe, corpus: Corpus) -> Folder:
    """Train the encoder that `recipe` describes; returns its folder, in which `trained.json` lies.

    The same recipe and corpus make the same run: one that was stopped goes on from its last checkpoint, one
    that is finished is not run again. A failed worker is started again up to `cluster.max_failures` times.
    Raises ValueError and FileNotFoundError for what cannot work, NonFiniteLossError, and WorkersFailedError.
    """
    key = run_key(recipe, corpus)
    target = encoder_folder(recipe, key)
    if (target / DONE).size() is not None:
        return target
    warn_of_idle(recipe.training)
    refuse(recipe, count_trained(recipe, corpus))
    run = run_folder(recipe, key)
    with _alone(run):
        if (target / DONE).size() is not None:  # by another command, since we looked
            return target
        best, last = _trained(recipe, corpus, run)
        _publish(best, last, target, recipe, corpus)
    return target


def _trained(recipe: Recipe, corpus: Corpus, run: Folder) -> tuple[Checkpoint, Checkpoint]:
    """(the best checkpoint, the last one) of a run that is finished now."""
    encoder = TextEncoder.load(recipe.encoder.model, layers=recipe.encoder.layers, max_tokens=recipe.encoder.max_tokens)
    plan = _plan(recipe, count_trained(recipe, corpus), len(corpus.labels), encoder)
    logger.info("%s", plan)  # first: to tokenise millions of texts takes minutes
    data = training_data(recipe, corpus, encoder)
    # By its name a worker might find nothing, as it works in another folder, or another node's own model.
    encoder.lexical = None  # of another memory, where the model is one's encoder
    start = recipe.encoder.model_copy(update={"model": str(stage(run, encoder))})
    checkpoints = Checkpoints(run / "checkpoints", recipe.cluster.checkpoints_kept)
    try:
        _run_workers(recipe.model_copy(update={"encoder": start}), run, data, plan)
    finally:
        lines = read_curves(run)
        if lines:
            (run / PICTURE).write(draw_curves(lines, recipe.training.evaluation.metric))
    last = checkpoints.latest()
    if last is None or not last.state["finished"]:
        raise FileNotFoundError(f"{run}: the workers ended without a last checkpoint: run the same command again")
    best = checkpoints.open(last.state["best_step"]) if last.state["best_step"] >= 0 else last
    if best is None:
        raise FileNotFoundError(
            f"{checkpoints.at(last.state['best_step'])}: the best checkpoint is damaged or gone; the newest one is "
            f"{last.encoder}, which `raexmc build --encoder` takes. Remove {run} to train again"
        )
    return best, last


def count_trained(recipe: Recipe, corpus: Corpus) -> int:
    """Instances that are trained on: those that have a label, and are not held out."""
    labels_N, evaluation = corpus.train.labels_per_row, recipe.training.evaluation
    if evaluation.every:
        labels_N = np.delete(labels_N, corpus.held_out_places(evaluation.holdout, _held_out_seed(recipe)))
    return int(np.count_nonzero(labels_N))


def training_data(recipe: Recipe, corpus: Corpus, encoder: TextEncoder) -> TrainingData:
    """The corpus as flat arrays; where the recipe evaluates while training, with a slice held out.

    Raises ValueError where nothing could be measured on that slice.
    """
    evaluation, held_out = recipe.training.evaluation, None
    if evaluation.every:
        corpus = corpus.hold_out(evaluation.holdout, _held_out_seed(recipe))
        test, section = corpus.test, recipe.corpus
        if not test.relevance.nnz:
            raise ValueError(
                f"training.evaluation.holdout is {evaluation.holdout}, and of the {len(test):,} rows held out none has "
                "a label that the others have, too: make it larger, or set training.evaluation.every to 0"
            )
        weights_L = inverse_propensity(corpus.train.relevance, section.propensity_a, section.propensity_b)
        tokens = tokenize_on_cluster(encoder, test.texts["text"], "held-out rows")
        held_out = HeldOut(tokens, test.relevance, test.filtered, weights_L)
    instances = tokenize_on_cluster(encoder, corpus.train.texts["text"], "instances")
    labels = tokenize_on_cluster(encoder, corpus.labels["text"], "labels")
    return TrainingData(corpus.train.texts["uid"], instances, labels, corpus.train.relevance, held_out)


def trained_encoder(recipe: Recipe, corpus: Corpus) -> Folder:
    """The folder of the encoder that `train` made for this recipe and corpus. Raises FileNotFoundError."""
    target = encoder_folder(recipe, run_key(recipe, corpus))
    if (target / DONE).size() is None:
        chosen = "; where training evaluates, prediction and the propensities choose the encoder, and are part of that"
        raise FileNotFoundError(
            f"no trained encoder for this recipe at {target}: run `raexmc train` with the same recipe"
            f"{chosen * bool(recipe.training.evaluation.every)}; or name any encoder with --encoder"
        )
    return target


def run_key(recipe: Recipe, corpus: Corpus) -> str:
    """Names a training run by all that its result follows from."""
    recorded = recipe.record()  # who reads an encoder from a store is no part of it
    encoder, training, prediction = (recorded[name] for name in ("encoder", "training", "prediction"))
    # What does nothing beside the other settings counts as it is by default.
    for name in idle_settings(recipe.training.mining):
        training["mining"][name] = MiningSection.model_fields[name].default
    if not recipe.training.evaluation.every:
        training["evaluation"] = EvaluationSection().model_dump(mode="json")
        if not recipe.training.mining.on:  # nothing is embedded
            encoder["batch_size"] = EncoderSection.model_fields["batch_size"].default
    prediction["k"] = PredictionSection.model_fields["k"].default  # held-out rows are measured to a depth of their own
    chosen_by: list[Any] | None = None
    if recipe.training.evaluation.every:
        section = recipe.corpus
        # The filter pairs are in the split's fingerprint, not in the corpus's.
        chosen_by = [section.propensity_a, section.propensity_b, corpus.train.fingerprint, prediction]
    parts: list[Any] = [
        encoder | _model_files(recipe.encoder.model),
        training,
        chosen_by,
        recipe.cluster.workers,
        corpus.fingerprint,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _model_files(model: str) -> dict[str, Any]:
    """{"files": {name: sha256}} of a model in a folder, whose files may be replaced by others; nothing for other
    models, which their names tell apart. Only of what is loaded from there: a note beside it makes no other model."""
    folder = Folder.at(model)
    names = [name for name in folder.names() if Path(name).suffix in MODEL_FILES]
    return {"files": {name: (folder / name).sha256() for name in names}} if names else {}


def encoder_folder(recipe: Recipe, key: str) -> Folder:
    return Folder.at(recipe.cluster.storage) / "encoders" / key


def run_folder(recipe: Recipe, key: str) -> Folder:
    """Where a run's checkpoints, curves and mined neighbours are."""
    return Folder.at(recipe.cluster.storage) / "training" / key


def _held_out_seed(recipe: Recipe) -> int:
    return recipe.training.seed + 1


def _plan(recipe: Recipe, labelled: int, labels: int, encoder: TextEncoder) -> Plan:
    return Plan(
        recipe,
        instances=labelled,
        steps_an_epoch=labelled // recipe.training.batch_size,
        parameters=sum(p.numel() for p in encoder.parameters()),
        memory_bytes=worker_bytes(encoder, recipe, labelled, labels),
    )


def _run_workers(recipe: Recipe, run: Folder, data: TrainingData, plan: Plan) -> None:
    """Until the workers have finished the run, whose `encoder.model` every node sees. Raises what a worker says that
    the run cannot go on for (see `train_worker`), and WorkersFailedError."""
    cluster = recipe.cluster
    # With the driver, whose end it shares: on another node it would take the run down with that node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress = ProgressActor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json", by_alias=True),
            "data": ray.put(flatten(data)),
            "folder": str(run),
            "mark": _leave_mark(run),
            "progress": progress,
        },
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.gpu else {}),
        ),
        # Gradients and keys go over NCCL; what is mined is on the CPU, and goes over gloo.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cluster.gpu else "gloo"),
        run_config=RunConfig(
            # Ray Train takes up a run of the same name from what it wrote about it; ours goes on from checkpoints
            # of its own, so each start is a new run to Ray.
            name=uuid.uuid4().hex,
            storage_path=(run / "ray").path,
            storage_filesystem=run.filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[Failures(progress)],  # type: ignore[list-item]  # mypy sees Train v1
            worker_runtime_env={"env_vars": KEEP_FREED_MEMORY},  # type: ignore[call-arg]  # mypy sees Train v1
        ),
    )
    watcher = Watcher(progress, plan)
    try:
        with _same_interrupt(), watcher:
            trainer.fit()
    except TrainingFailedError as error:
        if not watcher.stopped:
            raise workers_failed(error, cluster.max_failures) from None
    if watcher.stopped:
        raise watcher.stopped


def _leave_mark(run: Folder) -> str:
    """What the workers must find in the run's folder, or it is another node's."""
    mark = uuid.uuid4().hex
    (run / MARK).write(mark.encode())
    return mark


@contextmanager
def _alone(run: Folder) -> Iterator[None]:
    """While no other command trains this run: two would write over each other's checkpoints. The kernel takes the lock
    back whatever ends its holder (but for filesystems without locks, where a file stands for it). Raises ValueError."""
    Path(run.path).mkdir(parents=True, exist_ok=True)
    lock = FileLock((run / LOCK).path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"another command is training this recipe on this corpus, in {run}: wait for it, or end it, and this one "
            f"goes on from its last checkpoint (if there is none, remove {run / LOCK})"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _same_interrupt() -> Iterator[None]:
    """Give Ctrl-C its meaning back afterwards: Ray Train leaves its own handler there, which calls a dead actor."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _publish(best: Checkpoint, last: Checkpoint, target: Folder, recipe: Recipe, corpus: Corpus) -> None:
    fingerprint = TextEncoder.load(best.encoder.path).fingerprint
    with target.filling() as local:
        shutil.copytree(best.encoder.path, local, dirs_exist_ok=True)
    details = {
        "fingerprint": fingerprint,
        "corpus": corpus.fingerprint,
        "recipe": recipe.record(),
        "step": best.step,
        "steps": last.step,
        "best": last.state["best"],
    }
    (target / DONE).write(json.dumps(details, indent=2).encode())
