"""One step on one rank: embeddings, the loss over the in-batch memory of all ranks, gradients. Free of Ray.

The loss never sees the encoder's graph: it is taken on the gathered embeddings, and gives their gradients, which
are then carried back through the encoder. So it is the same computation with or without gradient caching (Gao et
al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021), and its memory does
not grow with the square of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from raexmc_ray.encoder import TextEncoder
from raexmc_ray.objective import Masks, PairMask, loss_and_gradients
from raexmc_ray.recipe import TrainingSection
from raexmc_ray.tokens import Chunk, Tokens
from raexmc_ray.train.gather import gather, reduce_scatter, sum_over_ranks
from raexmc_ray.train.meter import Meter
from raexmc_ray.train.sampler import Batch, Pairs


@dataclass(frozen=True)
class Prepared:
    """A batch as one rank's device needs it.

    chunks: this rank's instances, then its part of the labels; their ids are places in `words`. words: int64, the
    distinct tokens of these texts. instances, labels: how many of each. seed: what the dropout of chunk i follows
    from is seed + i, so that a chunk can be encoded again. ranks: how many train on the batch.
    """

    batch: Batch
    chunks: list[Chunk]
    words: torch.Tensor
    instances: int
    labels: int
    masks: Masks
    seed: int
    ranks: int

    @property
    def tokens(self) -> int:
        return int(sum(chunk.mask.sum() for chunk in self.chunks))

    @property
    def cells(self) -> int:
        """Tokens with the padding."""
        return sum(chunk.ids.numel() for chunk in self.chunks)


def prepare(
    batch: Batch,
    encoder: TextEncoder,
    instance_tokens: Tokens,
    label_tokens: Tokens,
    settings: TrainingSection,
    place: tuple[int, int],
    rank: int = 0,
    ranks: int = 1,
) -> Prepared:
    """Cut and pad the texts of this rank's part of `batch`, and lay out its masks.

    Each rank encodes an equal part of the rows and of the distinct labels; the last labels are repeated to fill
    up the last rank's part. place: (epoch, step), from which dropout follows.
    """
    labels_per_rank = -(-len(batch.labels_C) // ranks)
    places = np.arange(rank * labels_per_rank, (rank + 1) * labels_per_rank)
    labels = batch.labels_C[np.minimum(places, len(batch.labels_C) - 1)]
    rows = batch.rows_B[batch.start : batch.stop]
    tokens = concatenate(instance_tokens.take(rows), label_tokens.take(labels))
    pin, device = encoder.device.type == "cuda", encoder.device
    words, chunks = _distinct_words(list(encoder.chunks(tokens, settings.chunk_size)))
    chunks = [chunk.pin() if pin else chunk for chunk in chunks]
    positive = batch.drawn if settings.objective.positives == "drawn" else batch.known
    masks = Masks(
        _mask(positive, device),
        _mask(batch.known, device),
        _mask(batch.shared, device),
        torch.arange(batch.start, batch.stop, device=device),
        _votes(batch, device) if settings.objective.shared == "voting" else None,
    )
    seed = int(np.random.SeedSequence([settings.seed, *place, rank]).generate_state(1)[0])
    return Prepared(batch, chunks, words.to(device), len(rows), len(labels), masks, seed, ranks)


def accumulate_gradients(
    encoder: TextEncoder, prepared: Prepared, settings: TrainingSection, meter: Meter | None = None
) -> torch.Tensor:
    """Add the gradient of the whole batch's loss to the encoder's weights, on every rank; returns the loss.

    The loss is the mean over the queries of all ranks: a scalar, the same on each rank.
    """
    meter = meter or Meter(encoder.device)
    with meter("forward"):
        # Every chunk's backward would fill and add a gradient of the whole vocabulary: the words of the batch are
        # looked up once instead, and their gradient goes to its place once.
        words = encoder.words.detach()[prepared.words].requires_grad_()
        embeddings, graphs = _embed(encoder, prepared, words, keep_all=not settings.gradient_cache)
    with meter("communication"):
        queries_BD, part_CD = embeddings[: prepared.instances], embeddings[prepared.instances :]
        all_labels = gather(part_CD, prepared.ranks)  # the repeated ones at its end included
        with_instances = settings.objective.instances == "in_batch"
        instances_BD = gather(queries_BD, prepared.ranks) if with_instances else None
    with meter("loss"):
        loss, (to_queries, to_labels, to_instances) = loss_and_gradients(
            queries_BD,
            all_labels[: len(prepared.batch.labels_C)],
            instances_BD,
            prepared.masks,
            temperature=settings.temperature,
            decoupled=settings.objective.kind == "decoupled",
            scale=1 / len(prepared.batch.rows_B),
        )
    with meter("communication"):
        gradient = torch.empty_like(embeddings)
        gradient[: prepared.instances] = to_queries
        if to_instances is not None:
            gradient[: prepared.instances] += reduce_scatter(to_instances, prepared.ranks)
        repeated = len(all_labels) - len(to_labels)
        to_all_labels = nn.functional.pad(to_labels, (0, 0, 0, repeated))
        gradient[prepared.instances :] = reduce_scatter(to_all_labels, prepared.ranks)
    with meter("backward"):
        _carry_back(encoder, prepared, words, graphs, gradient)
        assert words.grad is not None
        if encoder.words.grad is None:
            encoder.words.grad = torch.zeros_like(encoder.words)
        encoder.words.grad.index_add_(0, prepared.words, words.grad)
    with meter("communication"):
        sum_over_ranks([loss, *(p.grad for p in encoder.parameters() if p.grad is not None)], prepared.ranks)
    return loss


def _embed(
    encoder: TextEncoder, prepared: Prepared, words: torch.Tensor, keep_all: bool
) -> tuple[torch.Tensor, list[tuple[Chunk, torch.Tensor | None]]]:
    """Embeddings [texts, width] without a graph, and of each chunk those with a graph: of all chunks, or, to save
    memory, only of the last ones, which are carried back first."""
    embeddings = torch.empty(prepared.instances + prepared.labels, encoder.width, device=encoder.device)
    graphs: list[tuple[Chunk, torch.Tensor | None]] = []
    first_kept = 0 if keep_all else _first_kept([chunk.ids.numel() for chunk in prepared.chunks])
    for i, chunk in enumerate(prepared.chunks):
        on_device = chunk.to(encoder.device)
        keep = i >= first_kept
        with torch.set_grad_enabled(keep):
            part = _forward(encoder, on_device, words, prepared.seed + i)
        embeddings[on_device.rows] = part.detach()
        graphs.append((on_device, part if keep else None))
    return embeddings, graphs


def _first_kept(cells: list[int]) -> int:
    """The first of the last chunks that together have no more cells than the largest chunk, whose graph needs that
    much memory anyway, later: they are the shortest texts, and so are not encoded twice for free."""
    return len(cells) - int(np.searchsorted(np.cumsum(cells[::-1]), max(cells), side="right"))


def _carry_back(
    encoder: TextEncoder,
    prepared: Prepared,
    words: torch.Tensor,
    graphs: list[tuple[Chunk, torch.Tensor | None]],
    gradient: torch.Tensor,
) -> None:
    """Backward through the encoder, the last chunk first; what has no graph is encoded again."""
    for i in reversed(range(len(graphs))):
        chunk, part = graphs.pop()
        if part is None:
            part = _forward(encoder, chunk, words, prepared.seed + i)
        part.backward(gradient[chunk.rows])  # type: ignore[no-untyped-call]


def _forward(encoder: TextEncoder, chunk: Chunk, words: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return encoder(chunk.ids, chunk.mask, words)


def _distinct_words(chunks: list[Chunk]) -> tuple[torch.Tensor, list[Chunk]]:
    """The distinct token ids of all chunks, and the chunks with places among them for ids."""
    words, places = torch.unique(torch.cat([chunk.ids.ravel() for chunk in chunks]), return_inverse=True)
    parts = torch.split(places, [chunk.ids.numel() for chunk in chunks])
    return words, [Chunk(c.rows, part.view_as(c.ids), c.mask) for c, part in zip(chunks, parts, strict=True)]


def _mask(pairs: Pairs, device: torch.device) -> PairMask:
    return PairMask(torch.from_numpy(pairs.offsets), torch.from_numpy(pairs.columns).to(device))


def _votes(batch: Batch, device: torch.device) -> torch.Tensor:
    """Sparse float [C, B]: which instances of the batch have which of its labels."""
    votes = batch.votes
    labels = np.repeat(np.arange(len(batch.labels_C)), np.diff(votes.offsets))
    shape = (len(batch.labels_C), len(batch.rows_B))
    places = torch.from_numpy(np.stack([labels, votes.columns]))
    return torch.sparse_coo_tensor(places, torch.ones(len(labels)), shape, is_coalesced=True, check_invariants=True).to(
        device
    )


def concatenate(first: Tokens, second: Tokens) -> Tokens:
    """The texts of `first`, then those of `second`."""
    return Tokens(
        np.concatenate([first.ids, second.ids]),
        np.concatenate([first.offsets, second.offsets[1:] + first.offsets[-1]]),
    )


def learning_rate(settings: TrainingSection, step: int, steps: int) -> float:
    """Of step `step` (from 0) of `steps`: up linearly over the warm-up, then down linearly to zero."""
    warmup = settings.warmup * steps
    if step + 1 < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * min(1.0, (steps - step) / max(steps - warmup, 1))


def make_optimizer(tower: nn.Module, settings: TrainingSection) -> torch.optim.AdamW:
    """AdamW over the tower's weights; decay on matrices only, not on biases and norms."""
    weights = [p for p in tower.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def gradient_norm(tower: nn.Module) -> torch.Tensor:
    """L2 norm of all gradients together: a scalar; not finite where any of them is not."""
    return torch.nn.utils.get_total_norm([p.grad for p in tower.parameters() if p.grad is not None])
