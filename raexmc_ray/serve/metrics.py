"""What Prometheus sees of the application, beside Serve's own metrics: names begin with `ray_raexmc_`.

Ray exports them on each node; `serve_configs/grafana.json` is a dashboard of them.
"""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge, Histogram

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
TEXTS = [2**power for power in range(11)]
"""Up to the largest batch that `batch_texts` may ask for: beyond the last of them a quantile says nothing."""


def request_counter() -> Counter:
    """Of ingress replicas, and of proxies, which know no application to name."""
    return Counter("raexmc_requests", "Requests by HTTP status.", tag_keys=("status",))


class IngressMetrics:
    """The metrics of an ingress replica."""

    def __init__(self) -> None:
        self._requests = request_counter()
        self._seconds = Histogram("raexmc_request_seconds", "Time of a request.", SECONDS, tag_keys=("path",))
        self._stages = Histogram("raexmc_stage_seconds", "Time of a stage of a batch.", SECONDS, tag_keys=("stage",))
        self._shards = Histogram("raexmc_shard_search_seconds", "Time of a shard's search.", SECONDS, ("shard",))
        self._texts = Histogram("raexmc_batch_texts", "Texts of a batch.", TEXTS)
        self._missing = Counter("raexmc_missing_shards", "Calls that a shard did not answer.", tag_keys=("shard",))
        self._retries = Counter("raexmc_retries", "Calls made again, of another replica if any.", tag_keys=("of",))
        self._snapshot = Gauge("raexmc_snapshot", "1 for the snapshot in use.", tag_keys=("snapshot",))

    def request(self, path: str, status: int, seconds: float) -> None:
        self._requests.inc(tags={"status": str(status)})
        if status < 400:  # also keeps paths that there are not out of the tags
            self._seconds.observe(seconds, tags={"path": path})

    def batch(self, texts: int) -> None:
        self._texts.observe(texts)

    def stages(self, seconds: dict[str, float]) -> None:
        """So long was spent in each stage."""
        for stage, spent in seconds.items():
            self._stages.observe(spent, tags={"stage": stage})

    def shard(self, shard: int, seconds: float) -> None:
        self._shards.observe(seconds, tags={"shard": str(shard)})

    def missing(self, shard: int) -> None:
        self._missing.inc(tags={"shard": str(shard)})

    def retry(self, of: str) -> None:
        self._retries.inc(tags={"of": of})

    def snapshot(self, snapshot: str) -> None:
        """To be said again and again: Ray forgets a gauge that is not set, and with it the snapshot before."""
        self._snapshot.set(1, tags={"snapshot": snapshot})
