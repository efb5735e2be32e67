"""Finds out in which layout a folder holds its corpus, and reads it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from raexmc_ray.corpus import json_lines, parquet, raw_text
from raexmc_ray.corpus.lines import is_there
from raexmc_ray.corpus.types import Corpus, CorpusError

Reader = Callable[[Path, Sequence[str]], Corpus]
LAYOUTS: dict[str, Reader] = {
    "lbl.json.gz": json_lines.read,
    "lbl.json": json_lines.read,
    "labels.parquet": parquet.read,
    "raw/Y.txt": raw_text.read,
}
logger = logging.getLogger("raexmc_ray")


def read_corpus(path: str | Path, fields: Sequence[str] = ("title",), holdout: float = 0.0) -> Corpus:
    """Read the corpus in folder `path`; `fields` are the JSON fields that make up a text, in order. A row of the other
    layouts has one text: there, fields that were chosen are told in the log to do nothing.

    With `holdout` above zero that share of the training rows stands in for the test part.

    Raises CorpusError for anything that is not a well-formed corpus, FileNotFoundError for a missing folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no corpus folder at {folder}: set corpus.path to a folder that exists")
    for name, reader in LAYOUTS.items():
        if is_there(folder / name):
            if reader is not json_lines.read and tuple(fields) != ("title",):
                logger.warning(
                    "corpus.fields is %s, and does nothing: %s has one text a row, and no fields",
                    list(fields), folder / name,
                )  # fmt: skip
            corpus = reader(folder, tuple(fields))
            return corpus.hold_out(holdout) if holdout else corpus
    raise CorpusError(
        folder, "no corpus here: expected lbl.json[.gz] (LF-XMC), labels.parquet, or raw/Y.txt (raw text)"
    )
