"""The method on `debian-related`: 3 layers, 6 epochs, batch 256; λ and τ chosen on held-out training rows.

1. Train on 90% of the training rows, and sweep λ and τ on the other 10%: the setting with the best mean of the
   five figures, each relative to its best, is taken. The test part is not touched.
2. Train on all training rows, build the memory, and measure it once on the test part at that setting.
"""

from __future__ import annotations

import logging
import sys
import time

from _result import at_least, below, print_targets, write_result
from _training import LAMBDAS, RECIPE, TEMPERATURES

from raexmc_ray.cluster import connected
from raexmc_ray.corpus import read_corpus
from raexmc_ray.evaluation import evaluate, format_table
from raexmc_ray.evaluation.sweep import choose, grid, sweep
from raexmc_ray.files import Folder
from raexmc_ray.local import Memory
from raexmc_ray.memory.build import build
from raexmc_ray.memory.pool import open_in_actors
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.trainer import train

TARGETS = {"P@1": 50.5, "P@5": 20.3, "PSP@1": 34.0, "PSP@5": 38.5, "R@10": 61.0}


def trained_memory(recipe: Recipe) -> tuple[Memory, dict[str, float]]:
    """Train and build what `recipe` says; the memory with its shards in actors, and the seconds it took."""
    corpus = read_corpus(recipe.corpus.path, recipe.corpus.fields, recipe.corpus.holdout)
    started = time.perf_counter()
    encoder = train(recipe, corpus)
    trained = time.perf_counter()
    build(recipe, corpus, encoder)
    built = time.perf_counter()
    memory, _ = open_in_actors(Folder.at(recipe.cluster.storage) / "memory")
    return memory, {"train_s": round(trained - started, 1), "build_s": round(built - trained, 1)}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = sys.argv[1:]
    with connected():
        held = Recipe.load(RECIPE, ["corpus.holdout=0.1", "cluster.storage=runs/debian-related-holdout", *overrides])
        corpus = read_corpus(held.corpus.path, held.corpus.fields, held.corpus.holdout)
        memory, held_seconds = trained_memory(held)
        swept = sweep(memory, corpus, held.corpus, grid(held.prediction, LAMBDAS, TEMPERATURES))
        chosen = choose(swept)
        lambda_, temperature = chosen.lambda_, chosen.temperature
        print(f"chosen on {len(corpus.test):,} held-out training rows: lambda {lambda_}, temperature {temperature}")

        recipe = Recipe.load(
            RECIPE, [f"prediction.lambda={lambda_}", f"prediction.temperature={temperature}", *overrides]
        )
        corpus = read_corpus(recipe.corpus.path, recipe.corpus.fields)
        memory, seconds = trained_memory(recipe)
        table = evaluate(memory, corpus, recipe.corpus, recipe.prediction).table
    print(format_table(table))

    both = table["both"]
    targets = [at_least(f"both {name}", both[name], target) for name, target in TARGETS.items()]
    for row in ("labels only", "instances only"):
        targets += [below(f"{row} {name}", table[row][name], both[name]) for name in TARGETS]
    rounded = {row: {name: round(value, 2) for name, value in figures.items()} for row, figures in table.items()}
    figures = {
        "table": rounded,
        "lambda": lambda_,
        "temperature": temperature,
        "held_out": {name: round(value, 2) for name, value in swept[chosen].items()},
        "holdout_run": held_seconds,
        "final_run": seconds,
    }
    write_result("debian_related", figures, targets)
    print_targets({}, targets)


if __name__ == "__main__":
    main()
