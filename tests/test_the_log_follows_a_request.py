"""A request's id leads from its entry in the access log to its batch, and to the shards that the batch waited for."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import logging.handlers
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from in_process import ingress_of
from ray._common.formatters import JSONFormatter

from raexmc_ray.serve.api import make_api
from raexmc_ray.serve.guard import Tokens
from raexmc_ray.serve.logs import SERVE, write
from raexmc_ray.serve.schema import ServeSettings

pytestmark = pytest.mark.ray
TEXT = "vim: an editor"


class Hanging:
    """Hangs the first `times` calls that come."""

    def __init__(self, times: int) -> None:
        self.times = times

    async def __call__(self) -> None:
        self.times -= 1
        if self.times >= 0:
            await asyncio.sleep(3600)


def logged(
    caplog: pytest.LogCaptureFixture, memory: Path, hangs: int = 0, **settings: Any
) -> tuple[list[int], list[dict[str, Any]], list[dict[str, Any]]]:
    """Statuses of two requests at a time, `one` and `two`, of which shard 1 hangs the first `hangs` searches; their
    entries in the access log; and the batches."""
    caplog.clear()
    given = ServeSettings(memory=str(memory), shard_timeout_s=0.6, **settings)

    async def run() -> list[int]:
        ingress = await ingress_of(given, {(1, "search"): Hanging(hangs)})
        api = make_api(ingress, given, Tokens(None))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test", timeout=30) as http:
            calls = [
                http.post("/v1/predict", json={"texts": number * [TEXT]}, headers={"x-request-id": name})
                for number, name in ((1, "one"), (2, "two"))
            ]
            replies = await asyncio.gather(*calls)
        while ingress._batcher._running:  # a batch's line comes after its last answer
            await asyncio.sleep(0.01)
        return [reply.status_code for reply in replies]

    with caplog.at_level(logging.INFO, logger="ray.serve"):
        statuses = asyncio.run(run())
    entries = {
        name: [json.loads(r.message) for r in caplog.records if r.name == f"ray.serve.{name}" and r.levelname == "INFO"]
        for name in ("access", "batches")
    }
    return statuses, sorted(entries["access"], key=lambda entry: entry["request"]), entries["batches"]


def batch_of(request: dict[str, Any], batches: list[dict[str, Any]]) -> dict[str, Any]:
    (batch,) = [batch for batch in batches if batch["batch"] == request["batch"]]
    assert request["request"] in batch["requests"]
    assert batch["snapshots"] == [request["snapshot"]]
    return batch


def test_a_request_is_found_in_its_batch(caplog: pytest.LogCaptureFixture, small_memory: Path) -> None:
    statuses, requests, batches = logged(caplog, small_memory)
    assert statuses == [200, 200]
    assert [request["texts"] for request in requests] == [1, 2]
    assert sum(batch["texts"] for batch in batches) == 3
    for request in requests:
        batch = batch_of(request, batches)
        assert list(batch["stages"]) == ["queue", "encode", "search", "merge", "aggregate"]
        assert list(batch["shards"]) == ["0", "1", "2"]
        assert all(milliseconds > 0 for milliseconds in (*batch["stages"].values(), *batch["shards"].values()))
        assert batch["again"] == batch["missing_shards"] == []
        assert {"total", *batch["stages"]} == set(request["stages"])


def test_a_shard_that_is_asked_again_or_missing_is_named(caplog: pytest.LogCaptureFixture, small_memory: Path) -> None:
    statuses, requests, batches = logged(caplog, small_memory, hangs=1, shard_replicas=2)
    assert statuses == [200, 200]
    assert "shard 1" in [again for request in requests for again in batch_of(request, batches)["again"]]

    statuses, requests, batches = logged(caplog, small_memory, hangs=9)
    assert statuses == [503, 503]
    for request in requests:
        batch = batch_of(request, batches)
        assert batch["missing_shards"] == [1]
        assert list(batch["shards"]) == ["0", "2"]
        assert request["texts"], "what fails is looked for, too"


@pytest.mark.parametrize("hangs", [0, 9])
def test_texts_are_logged_where_that_is_asked_for(
    caplog: pytest.LogCaptureFixture, small_memory: Path, hangs: int
) -> None:
    _, requests, _ = logged(caplog, small_memory, hangs=hangs, log_texts=True)
    assert [request["said"] for request in requests] == [[TEXT], 2 * [TEXT]]
    _, requests, _ = logged(caplog, small_memory, hangs=hangs)
    assert not any("said" in request for request in requests)
    assert TEXT not in caplog.text


def test_entries_are_fields_where_serve_logs_json(caplog: pytest.LogCaptureFixture) -> None:
    written = io.StringIO()
    file = logging.StreamHandler(written)
    file.setFormatter(JSONFormatter())
    gathering = logging.handlers.MemoryHandler(1, target=file)  # as Serve has it
    entry = {"request": "abc-123", "status": 200, "stages": {"queue": 0.1}}
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        try:
            SERVE.addHandler(gathering)
            write(logging.getLogger("ray.serve.access"), "request abc-123", entry)
        finally:
            SERVE.removeHandler(gathering)
        write(logging.getLogger("ray.serve.access"), "request abc-123", entry)
    line = json.loads(written.getvalue())
    assert entry.items() <= line.items()
    assert line["message"] == "request abc-123"
    assert json.loads(caplog.records[-1].message) == entry


def test_a_line_is_written_once(served: str) -> None:
    """To Serve's files, which are rotated, and not to what the processes print, which grows for ever."""
    name = "written-once-17"
    httpx.post(f"{served}/v1/predict", json={"texts": [TEXT]}, headers={"x-request-id": name}).raise_for_status()
    node: Any = ray._private.worker.global_worker.node
    logs, ends = Path(node.get_logs_dir_path()), time.monotonic() + 10

    def lines(pattern: str) -> list[str]:
        """Of entries of the access log."""
        found = [line for file in logs.glob(pattern) for line in file.read_text(errors="replace").splitlines()]
        return [line for line in found if f'"request": "{name}"' in line]

    while not lines("serve/*.log") and time.monotonic() < ends:
        time.sleep(0.05)
    assert len(lines("serve/*.log")) == 1
    assert lines("worker-*") == []
