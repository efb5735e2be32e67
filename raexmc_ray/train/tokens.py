"""Ray Data: the texts of a corpus as flat arrays of token ids, made once for all workers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data
import tokenizers

from raexmc_ray.embed import quiet_data
from raexmc_ray.progress import Progress
from raexmc_ray.tokens import Tokens, tokenize

if TYPE_CHECKING:
    from raexmc_ray.encoder import TextEncoder  # a task that tokenises would load transformers with it

BLOCK = 8192
"""Texts that one task tokenises."""
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false"}
"""Of a task, which owns one CPU: by default the tokenizer has as many threads as the node has cores, in each task."""


def tokenize_on_cluster(encoder: TextEncoder, texts: pa.ChunkedArray, name: str) -> Tokens:
    """Tokens of `texts` (Arrow strings), cut to the encoder's `max_tokens`, in parallel over the cluster."""
    if len(texts) <= BLOCK:  # not worth a task
        return encoder.tokenize(texts.to_pylist())
    quiet_data()
    # Sliced as they are: together, more than 2 GiB of text do not fit into one Arrow array of strings.
    table = pa.table({"row": np.arange(len(texts)), "text": texts})
    blocks = [table.slice(start, BLOCK) for start in range(0, len(table), BLOCK)]
    tokenize_block: Any = partial(_tokenize_block, tokenizer=encoder.tokenizer_json)
    done = ray.data.from_arrow(blocks).map_batches(
        tokenize_block, batch_size=None, batch_format="pyarrow", num_cpus=1, runtime_env={"env_vars": ONE_THREAD}
    )
    parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    with Progress(f"tokenize {name}", len(texts), "texts") as progress:
        block: Any
        for block in done.iter_batches(batch_size=1, batch_format="pyarrow"):
            ids, lengths = (block[name].combine_chunks().flatten().to_numpy() for name in ("ids", "lengths"))
            parts[block["row"][0].as_py()] = ids, lengths
            progress.add(len(lengths))
    ordered = [parts[row] for row in sorted(parts)]  # tasks end in any order
    lengths_N = np.concatenate([lengths for _, lengths in ordered])
    offsets = np.concatenate([[0], np.cumsum(lengths_N)])
    return Tokens(np.concatenate([ids for ids, _ in ordered]), offsets)


def _tokenize_block(block: pa.Table, tokenizer: str) -> pa.Table:
    """(row, text) of one block to one row: (its first row, ids, lengths)."""
    tokens = tokenize(tokenizers.Tokenizer.from_str(tokenizer), block["text"].to_pylist())
    return pa.table(
        {
            "row": block["row"][:1],
            "ids": pa.array([tokens.ids], pa.large_list(pa.int32())),
            "lengths": pa.array([tokens.lengths], pa.large_list(pa.int64())),
        }
    )
