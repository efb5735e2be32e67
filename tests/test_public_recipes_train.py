"""The recipes of the public benchmarks load, and train: two steps on the CPU, with two layers and a small batch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import MODEL, json_lines

from raexmc_ray.corpus import read_corpus
from raexmc_ray.files import Folder
from raexmc_ray.recipe import Recipe
from raexmc_ray.train.curves import read_curves
from raexmc_ray.train.loop import Loop
from raexmc_ray.train.trainer import training_data
from raexmc_ray.train.worker import make_encoder

PUBLIC = {
    "lf_amazontitles_131k": (0.6, 2.6, 32, ("title",), 3000, 3e-4),
    "lf_wikiseealso_320k": (0.55, 1.5, 128, ("title", "content"), 768, 7e-5),
    "lf_wikipedia_500k": (0.5, 0.4, 256, ("title", "content"), 768, 7e-5),
    "lf_amazontitles_1_3m": (0.6, 2.6, 32, ("title",), 3000, 3e-4),
}
"""Of the public benchmarks: A, B, tokens, fields, and DEXML's batch a GPU and learning rate."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty articles in the LF-XMC layout, some with long contents."""
    folder, rng = tmp_path_factory.mktemp("public"), np.random.default_rng(0)
    words = ["river", "bridge", "engine", "valley", "theorem", "painter", "castle", "harbour"]
    articles = [
        {
            "uid": str(i),
            "title": " ".join(rng.choice(words, 3)),
            "content": " ".join(rng.choice(words, int(rng.integers(5, 400)))),
            "target_ind": sorted({int(label) for label in rng.integers(0, 20, 3)}),
        }
        for i in range(40)
    ]
    (folder / "trn.json").write_bytes(json_lines(articles))
    (folder / "tst.json").write_bytes(json_lines(articles[:4]))
    (folder / "lbl.json").write_bytes(
        json_lines([{k: a[k] for k in ("uid", "title", "content")} for a in articles[:20]])
    )
    return folder


@pytest.mark.parametrize("name", PUBLIC)
def test_two_steps(name: str, corpus: Path, tmp_path: Path) -> None:
    path = ROOT / f"jobs/recipes/{name}.yaml"
    shipped = Recipe.load(path)
    a, b, tokens, fields, batch, learning_rate = PUBLIC[name]
    assert (shipped.corpus.propensity_a, shipped.corpus.propensity_b) == (a, b)
    assert (shipped.encoder.max_tokens, shipped.corpus.fields) == (tokens, fields)
    training, prediction = shipped.training, shipped.prediction
    assert (training.epochs, training.batch_size, training.learning_rate) == (100, 8 * batch, learning_rate)
    assert (training.weight_decay, training.warmup) == (0.01, 0.1)
    assert (training.temperature, prediction.temperature, prediction.lambda_) == (0.04, 0.04, 0.5)
    assert prediction.neighbours.joint == 200
    assert shipped.encoder.model == "distilbert-base-uncased"
    assert shipped.cluster.workers == 8
    assert shipped.cluster.gpu
    cut = ["training.batch_size=20", "training.epochs=1", "training.chunk_size=8", "training.precision=float32"]
    small = [f"encoder.model={MODEL}", "encoder.layers=2", "cluster.workers=1", "cluster.gpu=false"]
    recipe = Recipe.load(path, [*cut, *small, f"corpus.path={corpus}"])
    encoder = make_encoder(recipe, torch.device("cpu"))
    data = training_data(recipe, read_corpus(corpus, fields), encoder)
    longest = int(data.instances.lengths.max())
    assert longest == tokens if "content" in fields else longest < tokens
    before = torch.cat([p.detach().ravel() for p in encoder.parameters()])
    state = Loop(recipe, data, encoder, Folder.at(tmp_path), lambda step, figures: None).run()
    assert state.step == 2
    losses = [line["loss"] for line in read_curves(Folder.at(tmp_path))]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert not torch.equal(before, torch.cat([p.detach().ravel() for p in encoder.parameters()]))
