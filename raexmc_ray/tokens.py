"""Token ids of many texts: ragged, in flat arrays, and cut into chunks that a tower takes in one call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
import torch

from raexmc_ray.ragged import ragged_take


@dataclass(frozen=True)
class Tokens:
    """Ragged token ids as flat arrays, so that any number of processes can share them without a copy.

    ids: int32 [total]; offsets: int64 [texts + 1].
    """

    ids: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [texts]: tokens of each text."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Tokens:
        """The tokens of these texts, in this order."""
        return Tokens(*ragged_take(self.ids, self.offsets, rows))

    def padded(self, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(int64 [texts, longest] token ids, int64 [texts, longest] attention mask)."""
        lengths = self.lengths
        mask = np.arange(lengths.max())[None, :] < lengths[:, None]
        ids = np.full(mask.shape, pad_id, np.int64)
        ids[mask] = self.ids
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))

    def chunks_by_length(
        self, size: int, least: int = 1, call_tokens: int | None = None
    ) -> Iterator[tuple[np.ndarray, Tokens]]:
        """(rows, their tokens) in chunks of up to `size` texts of nearly equal length, the longest first:
        so little is padded, and memory is at its peak at once.

        least: where `size` gives fewer chunks than this, the texts are shared out over so many by their tokens.
        call_tokens: what one more chunk costs, in tokens: a chunk is cut in two where that saves more padding.
        """
        order = np.argsort(-self.lengths, kind="stable")
        lengths = self.lengths[order]
        starts = np.arange(0, len(order), size)
        if 0 < len(starts) < least:
            ends = np.cumsum(lengths)
            shares = ends[-1] * np.arange(1, least) / least
            starts = np.unique([0, *np.minimum(np.searchsorted(ends, shares) + 1, len(order) - 1)])
        for start, stop in itertools.pairwise([*starts, len(order)]):
            cut = [start] if call_tokens is None else _cut(lengths, start, stop, call_tokens)
            for first, end in itertools.pairwise([*cut, stop]):
                rows = order[first:end]
                yield rows, self.take(rows)


def _cut(lengths: np.ndarray, start: int, stop: int, call_tokens: int) -> list[int]:
    """Where chunks start among the texts start..stop-1, whose lengths fall, so that no cut saves more padding than
    `call_tokens`."""
    saved = (lengths[start] - lengths[start:stop]) * np.arange(stop - start, 0, -1)
    best = start + int(np.argmax(saved))
    if saved[best - start] <= call_tokens:
        return [start]
    return [*_cut(lengths, start, best, call_tokens), *_cut(lengths, best, stop, call_tokens)]


@dataclass(frozen=True)
class Chunk:
    """Texts of nearly equal length, padded to the longest: what goes through the tower in one call.

    rows: int64 [n], their places among the texts that were cut into chunks. ids, mask: int64 [n, longest].
    """

    rows: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor

    def to(self, device: torch.device) -> Chunk:
        """This chunk on `device`; the copy does not wait for it where the chunk is pinned."""
        return Chunk(*(tensor.to(device, non_blocking=True) for tensor in (self.rows, self.ids, self.mask)))

    def pin(self) -> Chunk:
        """This chunk in memory that a GPU copies from by itself."""
        return Chunk(self.rows.pin_memory(), self.ids.pin_memory(), self.mask.pin_memory())


def tokenize(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> Tokens:
    """Token ids of `texts`, in parallel over the CPUs."""
    encodings = backend.encode_batch_fast(list(texts))
    lengths = np.fromiter((len(e) for e in encodings), np.int64, len(encodings))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.fromiter((i for e in encodings for i in e.ids), np.int32, offsets[-1])
    return Tokens(ids, offsets)
