"""Gradient caching: peak memory from batch 256 to 4,096 at a fixed chunk, and its cost in time.

Each measurement is a process of its own that trains on as many texts as all others: what a process keeps grows with
the first thousands, whatever the batch (1,246 MiB after two steps of 256, 1,424 after 32). Its peak is the kernel's
high-water mark of resident memory, less what the embeddings of the batch take with their gradients (four float32 arrays
of texts × d).
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from _result import print_targets, write_result
from _training import RECIPE

from raexmc_ray.corpus import read_corpus
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.loop import agree_on_precision
from raexmc_ray.train.sampler import Sampler
from raexmc_ray.train.step import accumulate_gradients, make_optimizer, prepare
from raexmc_ray.train.worker import make_encoder

BATCHES = (256, 512, 1024, 2048, 4096)
UNCACHED = (256, 1024)
INSTANCES = 2 * max(BATCHES)
"""That each measurement trains on."""


def measure(batch: int, cached: bool) -> dict[str, float]:
    """The steps that this many instances take, in this process."""
    torch.set_num_threads(2)
    overrides = [f"training.batch_size={batch}", f"training.gradient_cache={str(cached).lower()}", "cluster.workers=1"]
    recipe = Recipe.load(RECIPE, overrides)
    corpus = read_corpus(recipe.corpus.path, recipe.corpus.fields)
    encoder = make_encoder(recipe, torch.device("cpu")).train()
    encoder.place(encoder.device, getattr(torch, agree_on_precision(recipe.training.precision, encoder.device)))
    instances = encoder.tokenize(corpus.train.texts["text"].to_pylist())
    labels = encoder.tokenize(corpus.labels["text"].to_pylist())
    sampler = Sampler(corpus.train.relevance, batch, 1, 0)
    optimizer = make_optimizer(encoder, recipe.training)
    seconds = []
    for step in range(INSTANCES // batch):
        prepared = prepare(sampler.batch(0, step), encoder, instances, labels, recipe.training, (0, step))
        started = time.perf_counter()
        accumulate_gradients(encoder, prepared, recipe.training)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    embeddings = (prepared.instances + prepared.labels) * encoder.dimension * 4 * 4
    return {
        "batch": batch,
        "peak_mib": round(peak / 2**20, 1),
        "embeddings_mib": round(embeddings / 2**20, 1),
        "net_mib": round((peak - embeddings) / 2**20, 1),
        "texts_per_s": round(batch / statistics.median(seconds[1:]), 1),
    }


def in_a_process(batch: int, cached: bool) -> dict[str, float]:
    command = [sys.executable, __file__, str(batch), str(int(cached))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(done.stdout.strip().splitlines()[-1])
    row: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def main() -> None:
    cached = [in_a_process(batch, True) for batch in BATCHES]
    plain = [in_a_process(batch, False) for batch in UNCACHED]
    smallest = cached[0]["net_mib"]
    furthest = max((row["net_mib"] / smallest for row in cached), key=lambda ratio: abs(ratio - 1))
    figures = {
        "cached": cached,
        "uncached": plain,
        "cost_in_time": round(plain[0]["texts_per_s"] / cached[0]["texts_per_s"], 3),
        "cost_in_time_batch_1024": round(plain[1]["texts_per_s"] / cached[2]["texts_per_s"], 3),
    }
    within = abs(furthest - 1) <= 0.1
    what = "peak memory at 256 to 4,096 / at 256, the furthest from 1"
    targets = [{"what": what, "figure": round(furthest, 4), "target": "0.9 to 1.1", "holds": within}]
    write_result("gradient_cache", figures, targets)
    print_targets(figures, targets)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(int(sys.argv[1]), bool(int(sys.argv[2])))))
    else:
        main()
