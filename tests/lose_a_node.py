"""Works on a local cluster of two nodes, and kills the one that is not the head once there is something to lose.

lose_a_node.py train RECIPE
lose_a_node.py score MEMORY INPUT OUTPUT K
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import ray
from ray._private.node import Node
from ray.cluster_utils import Cluster

from raexmc_ray.corpus import read_corpus
from raexmc_ray.files import Folder
from raexmc_ray.local import override
from raexmc_ray.memory.snapshot import open_snapshot
from raexmc_ray.recipe import ClusterSection, Recipe
from raexmc_ray.score.run import score
from raexmc_ray.train.checkpoint import SEAL
from raexmc_ray.train.trainer import train

Work = tuple[Callable[[], object], Callable[[], bool]]
"""What to do, and whether there is something to lose."""


def training(recipe_path: str) -> tuple[int, Work]:
    """One CPU a node: the run's two workers need both nodes."""
    recipe = Recipe.load(recipe_path)
    storage = Path(recipe.cluster.storage)
    return 1, (lambda: train(recipe, read_corpus(recipe.corpus.path)), lambda: bool(list(storage.rglob(SEAL))))


def scoring(memory: str, inputs: str, output: str, k: str) -> tuple[int, Work]:
    """Two CPUs a node: three shards and three encoders need both nodes."""

    def work() -> None:
        settings = override(open_snapshot(Folder.at(memory)).manifest.defaults, k=int(k))
        score(Folder.at(memory), [inputs], Folder.at(output), settings, ClusterSection(encoders=3))

    return 2, (work, lambda: bool(list(Path(output).rglob("part-*"))))


def main() -> None:
    cpus, (work, due) = {"train": training, "score": scoring}[sys.argv[1]](*sys.argv[2:])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    doomed = cluster.add_node(num_cpus=cpus)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        # Ray starts nodes from the main thread only, so the work has the other one.
        with ThreadPoolExecutor(1) as thread:
            working = thread.submit(work)
            while not due() and not working.done():
                time.sleep(0.02)
            if not working.done():
                kill(doomed)
                cluster.add_node(num_cpus=cpus)
            working.result()
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill(node: Node) -> None:
    """With all that runs on it."""
    killed = []
    for started in node.all_processes.values():
        for process in started:
            root = psutil.Process(process.process.pid)
            root.suspend()  # or a raylet starts workers in the place of those that die, which outlive it
            for member in [*root.children(recursive=True), root]:
                killed.append(" ".join(member.cmdline())[:30])
                member.kill()
    sys.stdout.write(f"killed a node: {sorted(killed)}\n")


if __name__ == "__main__":
    main()
