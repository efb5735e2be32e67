"""Our deployments and the calls between them, which do nothing: what Ray Serve itself takes, set up as ours is."""

import asyncio
import os
import sys
import threading
from typing import Any

from raexmc_ray.serve.environment import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # before Serve is imported: handles made here travel to the replicas with its settings

import ray
from fastapi import FastAPI, Request
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle

api = FastAPI()


@serve.deployment(max_ongoing_requests=1024)
class Nothing:
    async def work(self, texts: list[str]) -> int:
        return len(texts)


@serve.deployment(max_ongoing_requests=8192)
@serve.ingress(api)
class Ingress:
    def __init__(self, encoder: DeploymentHandle[Any], *shards: DeploymentHandle[Any]) -> None:
        self._encoder, self._shards = encoder, shards

    @api.get("/v1/ready")
    async def ready(self) -> dict[str, str]:
        return {"status": "ready"}

    @api.post("/v1/predict")
    async def predict(self, request: Request) -> dict[str, int]:
        texts = (await request.json())["texts"]
        await self._encoder.work.remote(texts)
        return {"found": sum(await asyncio.gather(*(shard.work.remote(texts) for shard in self._shards)))}


if __name__ == "__main__":
    shards, port = map(int, sys.argv[1:])
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options=HTTPOptions(port=port))
    small = {"num_cpus": 0.1}
    # What Serve's decorator makes of a class, mypy takes for the class.
    worker: Any = Nothing
    ingress: Any = Ingress
    parts = [worker.options(name=f"Nothing-{i}", ray_actor_options=small).bind() for i in range(shards)]
    encoder = worker.options(name="Encoder", ray_actor_options=small).bind()
    serve.run(ingress.options(ray_actor_options=small).bind(encoder, *parts))
    threading.Event().wait()
