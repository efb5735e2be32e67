"""Finds out in which layout a folder holds its corpus, and reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from raexmc_ray.corpus import json_lines, parquet, raw_text
from raexmc_ray.corpus.types import Corpus, CorpusError

Reader = Callable[[Path, Sequence[str]], Corpus]
LAYOUTS: dict[str, Reader] = {
    "lbl.json.gz": json_lines.read,
    "lbl.json": json_lines.read,
    "labels.parquet": parquet.read,
    "raw/Y.txt": raw_text.read,
}


def read_corpus(path: str | Path, fields: Sequence[str] = ("title",), holdout: float = 0.0) -> Corpus:
    """Read the corpus in folder `path`; `fields` are the JSON fields that make up a text, in order.

    With `holdout` above zero that share of the training rows stands in for the test part.

    Raises CorpusError for anything that is not a well-formed corpus, FileNotFoundError for a missing folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no corpus folder at {folder}: set corpus.path to a folder that exists")
    for name, reader in LAYOUTS.items():
        if (folder / name).is_file():
            corpus = reader(folder, tuple(fields))
            return corpus.hold_out(holdout) if holdout else corpus
    raise CorpusError(
        folder, "no corpus here: expected lbl.json[.gz] (LF-XMC), labels.parquet, or raw/Y.txt (raw text)"
    )
