"""In bfloat16 the answers are nearly those of float32, and depend little on the batch that they rode in."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MODEL
from torch import nn

import raexmc_ray
from raexmc_ray.corpus import read_corpus
from raexmc_ray.encoder import TextEncoder, use_hardware
from raexmc_ray.files import Folder
from raexmc_ray.lexical import Lexical
from raexmc_ray.predict import Predictions, aggregate
from raexmc_ray.recipe import Precision
from raexmc_ray.serve.again import Call
from raexmc_ray.serve.deployments import Encoder

TOLERANCE = 5e-3


def encoder_in(precision: Precision) -> TextEncoder:
    return use_hardware(TextEncoder.load(MODEL), torch.get_num_threads(), precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_frozen_weights_compute_the_same(tiny_texts: list[str], precision: Precision) -> None:
    as_it_is, frozen = TextEncoder.load(MODEL), TextEncoder.load(MODEL)
    as_it_is.place(torch.device("cpu"), getattr(torch, precision))
    use_hardware(frozen, 1, precision)
    expected, got = (encoder.encode(tiny_texts) for encoder in (as_it_is, frozen))
    assert np.abs(got - expected).max() < (1e-6 if precision == "float32" else 1e-3)
    assert frozen.fingerprint == as_it_is.fingerprint
    lexical = Lexical.fit(tiny_texts, dimension=64, weight=0.3)
    assert frozen.with_lexical(lexical).fingerprint == as_it_is.with_lexical(lexical).fingerprint
    assert (frozen.device, frozen.precision) == (torch.device("cpu"), precision)
    if "AVX" in torch.backends.cpu.get_cpu_capability() and precision == "float32":  # bfloat16: not on all of them
        assert not any(isinstance(module, nn.Linear) for module in frozen.modules()), "laid out for this CPU"


def test_an_answer_depends_little_on_its_batch(tiny_corpus: Path, tiny_texts: list[str], tmp_path: Path) -> None:
    raexmc_ray.build(read_corpus(tiny_corpus), TextEncoder.load(MODEL), tmp_path / "memory")
    memory = raexmc_ray.open(tmp_path / "memory")
    settings = memory.settings(10, temperature=0.04)

    def predict(queries_BD: np.ndarray) -> Predictions:
        hits = memory.search(queries_BD, settings.neighbours)
        return aggregate(hits, lambda_=settings.lambda_, temperature=settings.temperature, k=settings.k)

    reduced = encoder_in("bfloat16")
    alone = predict(np.concatenate([reduced.encode([text]) for text in tiny_texts]))
    in_float32 = predict(encoder_in("float32").encode(tiny_texts))
    together = predict(reduced.encode(tiny_texts))
    assert not np.array_equal(together.scores_Bk, in_float32.scores_Bk), "computed in bfloat16"
    for others, tolerance in ((alone, TOLERANCE), (in_float32, 3 * TOLERANCE)):
        for row, labels in enumerate(together.labels_Bk.tolist()):
            scores = dict(zip(others.labels_Bk[row].tolist(), others.scores_Bk[row].tolist(), strict=True))
            for place, label in enumerate(labels):
                score = float(together.scores_Bk[row, place])
                if label in scores:
                    assert scores[label] == pytest.approx(score, abs=tolerance)
                else:  # it fell behind the last of them
                    assert score == pytest.approx(float(others.scores_Bk[row, -1]), abs=tolerance)


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_a_served_encoder_computes_in_the_precision_it_is_given(
    small_memory: Path, tiny_texts: list[str], precision: Precision
) -> None:
    memory = raexmc_ray.open(small_memory)

    async def encode() -> np.ndarray:
        encoder = Encoder.func_or_class(Folder.at(small_memory), torch.get_num_threads(), False, precision, 32)
        await encoder.hold(memory.manifest.id)
        return await encoder.encode(memory.manifest.id, tiny_texts, call=Call())

    found_ND, expected_ND = asyncio.run(encode()), memory.encoder.encode(tiny_texts)
    assert (found_ND * expected_ND).sum(1).min() > 0.9999
    assert (np.abs(found_ND - expected_ND).max() < 1e-6) == (precision != "bfloat16"), "auto is float32 on a CPU"
