"""The whole trainer with one worker against a bare PyTorch loop: same model, batches, precision and threads.

The bare loop has its batches tokenised and padded in memory, and does nothing but forward, loss, backward and AdamW: no
Ray, no sampler, no masks, no checks, no curves. There are two:

    bare        instances and labels each padded to the longest of the batch: what one writes
    in_chunks   cut into the trainer's own chunks of nearly equal length: what is left is what the trainer costs

A shared machine's speed drifts by more than what is measured here, so each training is compared with the mean of the
loops right before and after it, in several rounds, and the median of the rounds' ratios counts.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from _result import at_least, print_targets, write_result
from _training import RECIPE, WARM_UP, cut, trainer_rate

from raexmc_ray.cluster import connected
from raexmc_ray.corpus import read_corpus
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.loop import agree_on_precision
from raexmc_ray.train.sampler import Sampler
from raexmc_ray.train.step import concatenate, make_optimizer
from raexmc_ray.train.worker import make_encoder

STEPS = 15
ROUNDS = 3
TRAINERS: dict[str, list[str]] = {"trainer": [], "trainer_cached": ["training.gradient_cache=true"]}
ONE_WORKER = ["training.epochs=1", "cluster.workers=1", "cluster.cpus_per_worker=2"]


def loop_rate(in_chunks: bool) -> float:
    """Texts a second of a loop that only trains."""
    recipe = Recipe.load(RECIPE, ONE_WORKER)
    settings = recipe.training
    corpus = cut(read_corpus(recipe.corpus.path, recipe.corpus.fields))
    encoder = make_encoder(recipe, torch.device("cpu")).train()
    encoder.place(encoder.device, getattr(torch, agree_on_precision(settings.precision, encoder.device)))
    texts, labels = (encoder.tokenize(t["text"].to_pylist()) for t in (corpus.train.texts, corpus.labels))
    sampler = Sampler(corpus.train.relevance, settings.batch_size, 1, 0)
    optimizer = make_optimizer(encoder, settings)
    batches = []
    for step in range(STEPS):
        batch = sampler.batch(0, step)
        parts = texts.take(batch.rows_B), labels.take(batch.labels_C)
        size = settings.chunk_size
        chunks = list(encoder.chunks(concatenate(*parts), size)) if in_chunks else [
            next(encoder.chunks(part, settings.batch_size)) for part in parts
        ]  # fmt: skip
        columns = np.full(len(batch.rows_B), -1)
        columns[np.repeat(np.arange(len(columns)), np.diff(batch.drawn.offsets))] = batch.drawn.columns
        batches.append((chunks, torch.from_numpy(columns)))
    ended = []
    for chunks, drawn in batches:
        embeddings = torch.cat([encoder(chunk.ids, chunk.mask) for chunk in chunks])
        if in_chunks:
            embeddings = embeddings[torch.argsort(torch.cat([chunk.rows for chunk in chunks]))]
        B = len(drawn)
        scores = embeddings[:B] @ embeddings.T / settings.temperature
        scores = scores.masked_fill(torch.nn.functional.one_hot(torch.arange(B), len(embeddings)).bool(), -1e4)
        loss = torch.nn.functional.cross_entropy(scores, drawn + B)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ended.append(time.perf_counter())
    return settings.batch_size * (len(ended) - WARM_UP) / (ended[-1] - ended[WARM_UP - 1])


def main() -> None:
    torch.set_num_threads(2)
    loops: dict[str, list[float]] = {"bare": [loop_rate(False)], "in_chunks": [loop_rate(True)]}
    ratios: dict[str, dict[str, list[float]]] = {name: {loop: [] for loop in loops} for name in TRAINERS}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in TRAINERS}
    for _ in range(ROUNDS):
        for name, overrides in TRAINERS.items():
            with connected():
                measured[name].append(trainer_rate(name, [*ONE_WORKER, *overrides]))
            for loop, rates in loops.items():
                rates.append(loop_rate(loop == "in_chunks"))
                ratios[name][loop].append(round(measured[name][-1]["texts_per_s"] / statistics.mean(rates[-2:]), 3))
    medians = {name: {loop: statistics.median(of) for loop, of in of_all.items()} for name, of_all in ratios.items()}
    figures = {
        "loops_texts_per_s": {loop: [round(rate, 1) for rate in rates] for loop, rates in loops.items()},
        "rounds, trainer / loop": ratios,
        "trainer / loop": medians,
        **measured,
    }
    waiting = statistics.median(figures["share_data"] for figures in measured["trainer"])
    targets = [
        at_least("trainer / bare loop", medians["trainer"]["bare"], 0.95),
        at_least("trainer with gradient cache / bare loop", medians["trainer_cached"]["bare"], 0.75),
        at_least("trainer / bare loop over the trainer's chunks", medians["trainer"]["in_chunks"], 0.95),
        at_least("trainer with gradient cache / the same", medians["trainer_cached"]["in_chunks"], 0.75),
        at_least("share of time not spent waiting for data", 1 - waiting, 0.98),
    ]
    write_result("training_throughput", figures, targets)
    print_targets(figures, targets)


if __name__ == "__main__":
    main()
