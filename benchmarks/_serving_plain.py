"""The application that one would write first: FastAPI, one encoder, one FAISS index, one process."""

from __future__ import annotations

import sys

import torch
import uvicorn
from fastapi import FastAPI

import raexmc_ray
from raexmc_ray.serve.schema import PredictReply, PredictRequest, TextAnswer

memory = raexmc_ray.open(sys.argv[1], verify=False)
memory.predict(["ready"])
torch.set_num_threads(2)
app = FastAPI()


@app.get("/v1/ready")
async def ready() -> dict[str, str]:
    return {"status": "ready"}


@app.post("/v1/predict")
async def predict(request: PredictRequest) -> PredictReply:
    # On the event loop: one text after the other. In threads, as `def` would have it, they get in each other's way.
    answers = memory.predict(request.texts, request.k)
    return PredictReply(
        snapshot=memory.manifest.id,
        answers=[TextAnswer(labels=labels) for labels in answers],
        missing_shards=[],
        milliseconds={},
    )


uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
