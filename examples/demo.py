"""The main job on a real corpus, from texts to HTTP answers: `make demo`.

corpus → train (Ray Train, two workers) → embed (Ray Data) → memory of four shards → evaluate → serve → ask.
The work runs in a process of its own; whatever happens to it, Ctrl-C included, every process that it started is
ended. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from pathlib import Path

from raexmc_ray.supervise import run_and_clean_up

RECIPE = Path(__file__).parent.parent / "jobs/recipes/demo.yaml"
ASKED = ("cargo", "r-cran-dplyr", "fcitx5")
"""Packages to ask for; where one is not in the test part, another one that is takes its place."""


def main(overrides: list[str]) -> None:
    """Run every step; prints what it does, the table of results, and three answers."""
    from raexmc_ray.cli import print_answer, print_plain
    from raexmc_ray.client import Client
    from raexmc_ray.cluster import connected
    from raexmc_ray.corpus import read_corpus
    from raexmc_ray.evaluation import evaluate, format_table
    from raexmc_ray.files import Folder
    from raexmc_ray.memory.build import build
    from raexmc_ray.memory.pool import open_in_actors
    from raexmc_ray.recipe import Recipe
    from raexmc_ray.serve.run import serving
    from raexmc_ray.serve.schema import ServeSettings
    from raexmc_ray.train.trainer import train

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("faiss.loader", "httpx", "ray"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    started = time.monotonic()

    def step(what: str) -> None:
        print_plain(f"\n[{time.monotonic() - started:5.0f} s] {what}")

    recipe = Recipe.load(RECIPE, overrides)
    step(f"Read the corpus {recipe.corpus.path}")
    corpus = read_corpus(recipe.corpus.path, recipe.corpus.fields, recipe.corpus.holdout)
    print_plain(corpus.describe())
    storage = Folder.at(recipe.cluster.storage)
    with connected(dashboard=True):
        step(f"Train the encoder: {recipe.cluster.workers} workers, {recipe.training.epochs} epochs")
        encoder = train(recipe, corpus)
        print_plain(f"encoder: {encoder}")
        step(f"Embed all instances and labels; build a memory of {recipe.memory.shards} shards")
        build(recipe, corpus, encoder)
        memory_path = str(storage / "memory")
        print_plain(f"memory: {memory_path}")
        step(f"Evaluate on {len(corpus.test):,} held-out instances (percent)")
        memory, pool = open_in_actors(storage / "memory")
        with pool:
            measured = evaluate(memory, corpus, recipe.corpus, recipe.prediction, recipe=recipe)
        measured.save(storage)
        print_plain(format_table(measured.table))
        step("Serve over HTTP, and ask for three packages that are not in the training part")
        uids = corpus.test.texts["uid"].to_pylist()
        texts = dict(zip(uids, corpus.test.texts["text"].to_pylist(), strict=True))
        asked = [*(uid for uid in ASKED if uid in texts), *uids][: len(ASKED)]
        with serving(ServeSettings(memory=memory_path), port=_free_port()) as url, Client(url) as client:
            for uid in asked:
                reply = client.predict([texts[uid]], k=10, evidence=3)
                print_answer(texts[uid], reply.answers[0].labels)
        step("Done")
        print_plain(f"Ask it yourself: .venv/bin/raexmc serve {recipe.cluster.storage}/memory")


def _free_port() -> int:
    """8000, or another port where that one is taken."""
    for port in (8000, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")


if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ side writes warnings on our terminal
    if "--supervised" in sys.argv:
        try:
            main([argument for argument in sys.argv[1:] if argument != "--supervised"])
        except KeyboardInterrupt:
            sys.exit(130)
    else:
        sys.exit(run_and_clean_up([sys.executable, __file__, "--supervised", *sys.argv[1:]]))
