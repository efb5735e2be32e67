"""Hard negatives from the encoder as it is: embeddings of all keys by all ranks, neighbours with FAISS.

Each rank embeds its part of the texts and indexes it; queries go round all ranks in blocks, and each rank merges
what the others found for its own. No rank ever holds all embeddings, and the result is the same for any number
of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import scipy.sparse as sp
import torch

from raexmc_ray.encoder import TextEncoder
from raexmc_ray.memory.index import GPU_WIDTH
from raexmc_ray.metrics import look_up
from raexmc_ray.recipe import MiningSection
from raexmc_ray.tokens import Tokens
from raexmc_ray.train.gather import exchange, gather
from raexmc_ray.train.sampler import Mined

QUERY_BLOCK = 4096
"""Queries of a rank that are searched at once."""
BLOCK_RANKS = 8
"""Ranks up to which each asks for so many queries at a time; more ranks ask for fewer."""
LARGEST_EXACT = 200_000
"""Keys of a rank up to which its search is exact; beyond, an inverted file is searched in part."""
NEIGHBOURS_PER_GROUP_MEMBER = 8
"""Neighbours looked up for each place in a group: late instances find their nearest ones taken."""


@dataclass(frozen=True)
class Part:
    """A rank's part of some rows: `vectors` float32 [n, d] of the rows first, first + ranks, first + 2·ranks …"""

    vectors: np.ndarray
    first: int
    ranks: int
    total: int

    @property
    def rows(self) -> np.ndarray:
        """int64 [n]: the rows that these vectors belong to."""
        return np.arange(self.first, self.total, self.ranks)


def embed_part(encoder: TextEncoder, tokens: Tokens, batch_size: int, rank: int = 0, ranks: int = 1) -> Part:
    """This rank's part of the embeddings of `tokens`, by the encoder in its evaluation mode."""
    training = encoder.training
    encoder.eval()
    mine = np.arange(rank, len(tokens), ranks)
    vectors = encoder.encode_tokens(tokens.take(mine), batch_size).cpu().numpy()
    encoder.train(training)
    return Part(vectors, rank, ranks, len(tokens))


def search(queries: Part, keys: Part, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows int32 [n, k], inner products float32 [n, k]) of the nearest keys of all ranks to this rank's queries.

    In the order (score descending, row ascending); −1 and −∞ where there are fewer than k keys.
    """
    found = max(1, min(k, len(keys.vectors)))
    index = _index(keys.vectors, found)
    # All ranks' queries meet on each: what these and their answers take must not grow with the ranks.
    size = max(1, QUERY_BLOCK * BLOCK_RANKS // max(BLOCK_RANKS, queries.ranks))
    blocks = -(-_rows_of_largest_part(queries) // size)
    # Not joined from blocks at the end: of millions of queries they are gigabytes, and would be there twice.
    rows = np.empty((len(queries.vectors), k), np.int32)
    scores = np.empty((len(queries.vectors), k), np.float32)
    for block in range(blocks):
        own = slice(block * size, (block + 1) * size)
        mine = queries.vectors[own]
        width = min(size, _rows_of_largest_part(queries) - block * size)
        padded = torch.from_numpy(np.pad(mine, ((0, width - len(mine)), (0, 0))))
        asked = gather(padded, queries.ranks).numpy()
        if len(keys.vectors):
            part_scores, places = index.search(asked, found)
        else:  # a rank without keys has none to offer
            part_scores, places = np.full((len(asked), 1), -np.inf, np.float32), np.full((len(asked), 1), -1)
        part_rows = np.where(places >= 0, keys.first + places * keys.ranks, -1)
        part_scores = np.where(places >= 0, part_scores, np.float32(-np.inf))
        short = ((0, 0), (0, k - part_rows.shape[1]))
        part_rows = np.pad(part_rows, short, constant_values=-1)
        part_scores = np.pad(part_scores, short, constant_values=-np.inf)
        shape = (queries.ranks, width, k)  # for each rank that asked; each gets, and sends, no more than its own
        found_rows = exchange(torch.from_numpy(part_rows.reshape(shape))).numpy()[:, : len(mine)]
        found_scores = exchange(torch.from_numpy(part_scores.reshape(shape))).numpy()[:, : len(mine)]
        merged_rows, merged_scores = np.concatenate(found_rows, axis=1), np.concatenate(found_scores, axis=1)
        order = np.lexsort((merged_rows, -merged_scores))[:, :k]
        rows[own] = np.take_along_axis(merged_rows, order, 1)
        scores[own] = np.take_along_axis(merged_scores, order, 1)
    return rows, scores


def mine(
    instances: Part, labels: Part, relevance: sp.csr_matrix, settings: MiningSection, rng: np.random.Generator
) -> Mined:
    """The neighbours and the hard negatives that `settings` ask for, from the embeddings of all ranks.

    relevance: CSR [N, L]. The same on every rank: each one ends up with all of it.
    """
    grouped, groups = np.empty(0, np.int64), np.zeros(1, np.int64)
    if settings.batches == "neighbours":
        neighbours, _ = search(instances, instances, 1 + NEIGHBOURS_PER_GROUP_MEMBER * settings.group)
        labelled = np.diff(relevance.indptr) > 0
        neighbours = all_rows(neighbours, instances)
        grouped, groups = group_neighbours(neighbours, labelled, settings.group, rng)
    candidates = np.empty((instances.total, 0), np.int32)
    if settings.labels:
        nearest = search(instances, labels, settings.depth)[0]
        known = relevance[instances.rows]
        for start in range(0, len(nearest), QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            nearest[block] = _without_known(nearest[block], known[block])
        candidates = all_rows(nearest, instances)
    return Mined(grouped, groups, candidates)


def group_neighbours(
    neighbours_Nk: np.ndarray, labelled_N: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, starts of the groups): every labelled row once, in groups of up to `size` rows that lie close.

    neighbours_Nk: int, the nearest rows of each row, the nearest first, −1 for none. Rows in random order found a
    group with the nearest ones that are still free, as in NGAME (Dahiya et al., WSDM 2023) but without clustering.
    """
    free = labelled_N.copy()
    members: list[np.ndarray] = []
    for founder in rng.permutation(np.flatnonzero(labelled_N)):
        if not free[founder]:
            continue
        free[founder] = False
        nearest = neighbours_Nk[founder]
        nearest = nearest[free[nearest] & (nearest >= 0)][: size - 1]
        free[nearest] = False
        members.append(np.concatenate([[founder], nearest]))
    lengths = [len(group) for group in members]
    return np.concatenate(members).astype(np.int64), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _index(vectors: np.ndarray, k: int) -> Any:
    """An inner-product index of a rank's keys, on its GPU where FAISS can use one and finds k keys there."""
    n, d = vectors.shape
    if n <= LARGEST_EXACT:
        index: Any = faiss.IndexFlatIP(d)
    else:
        lists = int(4 * n**0.5)
        index = faiss.index_factory(d, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.nprobe = 16
    if k <= GPU_WIDTH and getattr(faiss, "get_num_gpus", lambda: 0)() and torch.cuda.is_available():
        torch.cuda.empty_cache()  # FAISS can have none of the memory that torch keeps for itself
        resources = faiss.StandardGpuResources()
        index = faiss.index_cpu_to_gpu(resources, torch.cuda.current_device(), index)
        index.resources = resources  # which must live as long as the index
    if not index.is_trained:
        index.train(vectors[:: max(1, n // (64 * int(4 * n**0.5)))])
    index.add(vectors)
    return index


def _rows_of_largest_part(part: Part) -> int:
    return -(-part.total // part.ranks)


def all_rows(mine: np.ndarray, part: Part) -> np.ndarray:
    """[total, …] in row order from each rank's [n, …]."""
    padded = np.pad(mine, ((0, _rows_of_largest_part(part) - len(mine)), (0, 0)))
    everyone = gather(torch.from_numpy(padded), part.ranks).numpy().reshape(part.ranks, *padded.shape)
    return everyone.swapaxes(0, 1).reshape(-1, padded.shape[1])[: part.total]


def _without_known(labels: np.ndarray, relevance: sp.csr_matrix) -> np.ndarray:
    """`labels` [n, k] without each row's known ones, moved up, −1 at the end."""
    wrong = (labels >= 0) & ~look_up(labels, relevance)
    order = np.argsort(~wrong, axis=1, kind="stable")
    return np.where(np.take_along_axis(wrong, order, 1), np.take_along_axis(labels, order, 1), -1)
