"""Trains on a local cluster of two nodes, and kills the one that is not the head: `lose_a_node.py RECIPE`."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import ray
from ray._private.node import Node
from ray.cluster_utils import Cluster

from raexmc_ray.corpus import read_corpus
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.checkpoint import SEAL
from raexmc_ray.train.trainer import train


def main() -> None:
    recipe = Recipe.load(sys.argv[1])
    # One CPU each: the run's two workers need both nodes.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    doomed = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)

    try:
        lose_and_train(recipe, cluster, doomed)
    finally:
        ray.shutdown()
        cluster.shutdown()


def lose_and_train(recipe: Recipe, cluster: Cluster, doomed: Node) -> None:
    """Train, and kill the node once there is a checkpoint."""
    # Ray starts nodes from the main thread only, so the training has the other one.
    with ThreadPoolExecutor(1) as thread:
        training = thread.submit(train, recipe, read_corpus(recipe.corpus.path))
        while not list(Path(recipe.cluster.storage).rglob(SEAL)):
            time.sleep(0.02)
        for started in doomed.all_processes.values():
            for process in started:
                root = psutil.Process(process.process.pid)
                for member in [*root.children(recursive=True), root]:
                    member.kill()
        sys.stdout.write("killed a node\n")
        cluster.add_node(num_cpus=1)
        training.result()


if __name__ == "__main__":
    main()
