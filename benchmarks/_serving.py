"""What the serving benchmarks share: the memories, the servers in processes of their own, and the load from outside.

Three servers answer the same request with the same encoder:

    ours      `raexmc serve`: Ray Serve with batches, four shards
    plain     one process: FastAPI, the encoder, one FAISS index; no Ray, no batches
    nothing   Ray Serve with our deployments and calls, which do nothing
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAEXMC_NUM_CPUS", "4")

import httpx

from raexmc_ray.cluster import connected
from raexmc_ray.corpus import read_corpus
from raexmc_ray.embed import stage_encoder
from raexmc_ray.files import Folder
from raexmc_ray.memory.build import build
from raexmc_ray.recipe import Recipe

HERE = Path(__file__).parent
FOLDER = Path("runs/serving")
CORPUS = "examples/debian-related"
SHARDS = 4
PREDICT = "/v1/predict"


def memories() -> tuple[Path, Path, list[str]]:
    """The shipped corpus in four shards and in one, with the package's encoder as it is; texts of the test part."""
    corpus = read_corpus(CORPUS)
    with connected():
        for shards in (SHARDS, 1):
            storage = FOLDER / f"{shards}-shards"
            content = {
                "corpus": {"path": CORPUS},
                "encoder": {"max_tokens": 32},
                "memory": {"shards": shards},
                "cluster": {"storage": str(storage), "encoders": 2},
            }
            recipe = Recipe.parse(content)
            if shards == 1 and not (storage / "embeddings").exists():
                storage.mkdir(parents=True, exist_ok=True)
            build(recipe, corpus, stage_encoder(Folder.at(storage), recipe.encoder.model, recipe.encoder))
    texts = FOLDER / "texts.json"
    texts.write_text(json.dumps(corpus.test.texts["text"].to_pylist()))
    return FOLDER / f"{SHARDS}-shards/memory", FOLDER / "1-shards/memory", json.loads(texts.read_text())


@contextmanager
def server(*command: str) -> Iterator[str]:
    """Run `command` with a free port put in for PORT; gives the URL once it is ready, and ends what it started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = [argument.replace("PORT", port) for argument in command]
    with (FOLDER / "server.log").open("w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        ends = time.monotonic() + 180
        while True:
            try:
                if httpx.get(f"{url}/v1/ready", timeout=30).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"{arguments} did not start: see {log.name}")
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ours(memory: Path, *options: str) -> list[str]:
    return [str(Path(sys.executable).parent / "raexmc"), "serve", str(memory), "--port", "PORT", *options]


def plain(memory: Path) -> list[str]:
    return [sys.executable, str(HERE / "_serving_plain.py"), str(memory), "PORT"]


def nothing() -> list[str]:
    return [sys.executable, str(HERE / "_serving_nothing.py"), str(SHARDS), "PORT"]


def load(url: str, texts: list[str], callers: int, seconds: int) -> dict[str, Any]:
    """Texts a second and latencies (ms) of so many callers, each with one text a request, by wrk (one thread)."""
    wrk = shutil.which("wrk")
    if not wrk:
        raise FileNotFoundError("wrk makes the load: apt-get install wrk")
    script = FOLDER / "load.lua"
    bodies = [json.dumps({"texts": [text]}) for text in texts]
    listed = ",\n".join("[==[" + body + "]==]" for body in bodies)
    script.write_text(
        f"local bodies = {{{listed}}}\n"
        "local n = 0\n"
        "local headers = {['Content-Type'] = 'application/json'}\n"
        "request = function() n = n % #bodies + 1\n"
        f"  return wrk.format('POST', '{PREDICT}', headers, bodies[n]) end\n"
        "done = function(s, l, r) io.write(string.format(\n"
        '  \'RESULT {"requests": %d, "us": %d, "bad": %d, "p50": %.3f, "p99": %.3f}\\n\', s.requests, s.duration,\n'
        "  s.errors.status + s.errors.connect + s.errors.read + s.errors.timeout,\n"
        "  l:percentile(50) / 1000, l:percentile(99) / 1000)) end\n"
    )
    command = [wrk, "-t1", f"-c{callers}", f"-d{seconds}s", "--timeout", "30s", "-s", str(script), url]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 60).stdout
    found = json.loads(re.search(r"RESULT (.*)", said)[1])  # type: ignore[index]  # the script prints one
    if found["bad"]:
        raise RuntimeError(f"{found['bad']} requests failed: {said}")
    return {
        "texts_per_s": round(1e6 * found["requests"] / found["us"], 1),
        "p50_ms": found["p50"],
        "p99_ms": found["p99"],
    }
