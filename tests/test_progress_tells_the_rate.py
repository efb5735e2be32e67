"""The line of progress tells the speed of this run, whatever was done before it."""

from raexmc_ray.progress import Progress


def test_what_was_done_before_is_in_the_count_and_not_in_the_rate() -> None:
    now = 0.0
    progress = Progress("train", 5_120_000, "texts")
    progress._bar._time = lambda: now
    progress.begin_at(2_560_000)
    for _ in range(60):
        now += 1
        progress.add(256)
    assert str(progress._bar).startswith("train: 2,575,360 of 5,120,000 texts, 256.00 texts/s, 2:45:40 left")
