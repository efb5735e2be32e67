"""Two workers with one thread each against one worker with two threads, on the same two cores."""

from __future__ import annotations

from _result import at_least, print_targets, write_result
from _training import trainer_rate

from raexmc_ray.cluster import connected


def main() -> None:
    with connected():
        one = [["training.epochs=1", "cluster.workers=1", "cluster.cpus_per_worker=2"]]
        first = trainer_rate("workers-one", *one)
        two = trainer_rate("workers-two", ["training.epochs=1", "cluster.workers=2", "cluster.cpus_per_worker=1"])
        second = trainer_rate("workers-one", *one)
    best = max(first["texts_per_s"], second["texts_per_s"])
    figures = {"one_worker": [first, second], "two_workers": two}
    targets = [at_least("two workers / one worker, texts/s", two["texts_per_s"] / best, 0.85)]
    write_result("training_workers", figures, targets)
    print_targets(figures, targets)


if __name__ == "__main__":
    main()
