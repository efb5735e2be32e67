"""The driver's side of training: hand the corpus to the workers, show progress, publish the encoder."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from raexmc_ray.corpus import Corpus
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder
from raexmc_ray.progress import Progress
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.sampler import Sampler
from raexmc_ray.train.worker import ENCODER, train_worker

DONE = "trained.json"
POLL_S = 0.5


def train(recipe: Recipe, corpus: Corpus) -> Folder:
    """Train the encoder that `recipe` describes; returns its folder, in which `trained.json` lies.

    The same recipe and corpus make the same run: one that was stopped goes on from its last checkpoint, one
    that is finished is not run again. A failed worker is started again up to `cluster.max_failures` times.
    """
    key = run_key(recipe, corpus)
    target = encoder_folder(recipe, key)
    if (target / DONE).size() is not None:
        return target
    settings = recipe.training
    sampler = Sampler(corpus.train.relevance, settings.batch_size, settings.positives_per_instance, settings.seed)
    encoder = TextEncoder.load(recipe.encoder.model, layers=recipe.encoder.layers, max_tokens=recipe.encoder.max_tokens)
    progress = ProgressActor.remote()  # type: ignore[attr-defined]
    checkpoints = Folder.at(recipe.cluster.storage) / "checkpoints"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json", by_alias=True),
            "arrays": ray.put(_flat_arrays(corpus, encoder)),
            "progress": progress,
        },
        scaling_config=ScalingConfig(
            num_workers=recipe.cluster.workers,
            use_gpu=recipe.cluster.gpu,
            resources_per_worker={"CPU": recipe.cluster.cpus_per_worker} | ({"GPU": 1} if recipe.cluster.gpu else {}),
        ),
        run_config=RunConfig(
            name=key,
            storage_path=checkpoints.path,
            storage_filesystem=checkpoints.filesystem,
            failure_config=FailureConfig(max_failures=recipe.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with _Watcher(progress, settings.epochs * sampler.steps, sampler.steps, settings.batch_size):
        result = trainer.fit()
    if result.error is not None:
        raise result.error
    assert result.checkpoint is not None, "a finished run has a checkpoint"
    with result.checkpoint.as_directory() as folder:
        trained = TextEncoder.load(f"{folder}/{ENCODER}")
        target.upload(Path(folder) / ENCODER)
    details = {
        "fingerprint": trained.fingerprint,
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "metrics": {name: (result.metrics or {}).get(name) for name in ("epoch", "loss", "learning_rate")},
    }
    (target / DONE).write(json.dumps(details, indent=2).encode())
    return target


def trained_encoder(recipe: Recipe, corpus: Corpus) -> Folder:
    """The folder of the encoder that `train` made for this recipe and corpus. Raises FileNotFoundError."""
    target = encoder_folder(recipe, run_key(recipe, corpus))
    if (target / DONE).size() is None:
        raise FileNotFoundError(
            f"no trained encoder for this recipe at {target}: run `raexmc train` with the same recipe, or name "
            "any encoder with --encoder"
        )
    return target


def run_key(recipe: Recipe, corpus: Corpus) -> str:
    """Names a training run by all that its result follows from."""
    parts: list[Any] = [
        recipe.encoder.model_dump(mode="json"),
        recipe.training.model_dump(mode="json"),
        recipe.cluster.workers,
        corpus.fingerprint,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def encoder_folder(recipe: Recipe, key: str) -> Folder:
    return Folder.at(recipe.cluster.storage) / "encoders" / key


def _flat_arrays(corpus: Corpus, encoder: TextEncoder) -> dict[str, Any]:
    """The corpus as the workers need it: arrays that they read from shared memory, without a copy."""
    instances = encoder.tokenize(corpus.train.texts["text"].to_pylist())
    labels = encoder.tokenize(corpus.labels["text"].to_pylist())
    relevance = corpus.train.relevance
    return {
        "instance_ids": instances.ids,
        "instance_offsets": instances.offsets,
        "label_ids": labels.ids,
        "label_offsets": labels.offsets,
        "indptr": relevance.indptr,
        "indices": relevance.indices,
        "shape": relevance.shape,
    }


@ray.remote(num_cpus=0)
class ProgressActor:
    """Where the first worker says how far it is, and the driver reads it."""

    def __init__(self) -> None:
        self._state = (0, 0.0, 0.0)

    def update(self, steps: int, loss: float, learning_rate: float) -> None:
        self._state = (steps, loss, learning_rate)

    def get(self) -> tuple[int, float, float]:
        """(steps done, last loss, learning rate)."""
        return self._state


class _Watcher:
    """Shows a ProgressActor's state on one line, in a thread, while in use."""

    def __init__(self, actor: Any, steps: int, steps_an_epoch: int, batch_size: int) -> None:
        self._actor = actor
        self._steps_an_epoch, self._batch_size = steps_an_epoch, batch_size
        self._progress = Progress("train", steps * batch_size, "texts")
        self._stop = threading.Event()
        self._shown = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._progress.__enter__()
        self._thread.start()

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()
        if error[0] is None:
            self._show()
        self._progress.__exit__(*error)
        ray.kill(self._actor)

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            self._show()

    def _show(self) -> None:
        steps, loss, rate = ray.get(self._actor.get.remote())
        if steps > self._shown:
            epoch = -(-steps // self._steps_an_epoch)
            self._progress.add(
                (steps - self._shown) * self._batch_size,
                epoch=str(epoch),
                loss=f"{loss:.3f}",
                lr=f"{rate:.1e}",
            )
            self._shown = steps
