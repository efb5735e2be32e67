"""Evaluating predictions that were written to files: what `raexmc score` makes of the rows of a test part."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raexmc_ray.corpus import Corpus
from raexmc_ray.evaluation.measure import BOTH, DEPTH, POPULARITY, measure, popular, recipe_of, refuse_unlabelled
from raexmc_ray.evaluation.result import Measured
from raexmc_ray.evaluation.retrieve import Stopwatch
from raexmc_ray.files import Folder
from raexmc_ray.inputs.job import REJECTED
from raexmc_ray.metrics import PRECISION_AT, RECALL_AT, look_up
from raexmc_ray.recipe import CorpusSection, PredictionSection, Recipe

PREDICTIONS = "evaluation-predictions.json"
BLOCK_ROWS = 1024
"""Rows put in order at once: a few megabytes at a hundred and fifty labels each."""
logger = logging.getLogger("raexmc_ray")


@dataclass(frozen=True)
class PredictedRows:
    """The rows of files of predictions.

    ids: strings, one a row. labels: int32, of all rows one after the other, the best first; offsets: int64.
    files: the file of each row, as a place in `names`. k: labels asked for; a row with fewer has no more.
    """

    ids: pa.Array
    labels: np.ndarray
    offsets: np.ndarray
    files: np.ndarray
    names: list[str]
    k: int
    settings: PredictionSection | None
    snapshot: str | None


def evaluate_predictions(
    folder: Folder, corpus: Corpus, section: CorpusSection, *, recipe: Recipe | None = None
) -> Measured:
    """The evaluation of the predictions under `folder` for the test part of `corpus`; their ids are its uids.

    The table has `popularity` and `both`. Filter pairs are taken out before the first k are looked at. Metrics that
    need more labels than were predicted are left out, which is logged. recipe: of the run that measures; it does not
    say how the memory was made that predicted, so that is not recorded (`recipe_of`). Raises ValueError where a row has
    no prediction, or two, or a prediction is of no row.
    """
    refuse_unlabelled(corpus)
    clock = Stopwatch()
    with clock.stage("read"):
        written = read_predictions(folder, len(corpus.labels))
        predicted, depth = by_row(written, corpus)
    deepest = max(*PRECISION_AT, *RECALL_AT)
    if depth < deepest:
        logger.warning(
            "%s: %d labels were predicted for each row, of which filter pairs leave %d in the row with most of them: "
            "metrics that need more are left out. For all of them: raexmc score --k %d",
            folder, written.k, depth, deepest + corpus.test.most_filtered,
        )  # fmt: skip
    if not depth:
        raise ValueError(f"{folder}: no label is left of a row's predictions: predict more of them (--k)")
    return measure(
        {POPULARITY: popular(corpus, depth), BOTH: predicted},
        corpus,
        section,
        depth=depth,
        clock=clock,
        settings=written.settings,
        snapshot=written.snapshot,
        recipe=recipe_of(recipe, written.settings, {}) if recipe else None,
    )


def read_predictions(folder: Folder, L: int) -> PredictedRows:
    """All predictions under a folder, of L labels, in the order of the files' paths. Raises FileNotFoundError,
    ValueError."""
    selector = pafs.FileSelector(folder.path, recursive=True, allow_not_found=True)
    paths = sorted(info.path for info in folder.filesystem.get_file_info(selector) if _is_part(info.path, folder.path))
    if not paths:
        raise FileNotFoundError(f"no predictions under {folder}: there is no Parquet file; `raexmc score` writes them")
    parts, said = [], set()
    for path in paths:
        file = Folder(folder.filesystem, path)
        try:
            with folder.filesystem.open_input_file(path) as source:
                table = pq.read_table(source, columns=["id", "labels"])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file}: is no file of predictions, or torn: {error}") from None
        if not pa.types.is_integer(getattr(table.schema.field("labels").type, "value_type", pa.string())):
            raise ValueError(f"{file}: column 'labels' must be lists of integers: {table.schema.field('labels').type}")
        said.add(_said(table.schema.metadata or {}))
        parts.append(_read_part(file, table, L))
    settings, snapshot = said.pop() if len(said) == 1 else (None, None)
    if said:
        raise ValueError(f"{folder}: has predictions of several runs ({len(said)} settings or snapshots): name one")
    ids, labels, lengths_of_parts = zip(*parts, strict=True)
    lengths = np.concatenate(lengths_of_parts)
    read = PredictionSection.model_validate_json(settings) if settings else None
    return PredictedRows(
        pa.concat_arrays(ids),
        np.concatenate(labels),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.repeat(np.arange(len(paths)), list(map(len, ids))),
        paths,
        read.k if read else int(lengths.max(initial=0)),
        read,
        snapshot,
    )


def _read_part(file: Folder, table: pa.Table, L: int) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """(ids, labels int32, labels of each row int64) of a file. Raises ValueError where a label is none of L."""
    ids = table["id"].combine_chunks().cast(pa.large_string())
    lists = table["labels"].combine_chunks().cast(pa.large_list(pa.int64()))
    labels, offsets = lists.flatten().to_numpy(), lists.offsets.to_numpy()
    wrong = np.flatnonzero((labels < 0) | (labels >= L))
    if len(wrong):
        place = int(np.searchsorted(offsets, wrong[0], side="right")) - 1
        raise ValueError(
            f"{file}, id {ids[place].as_py()!r}: label {labels[wrong[0]]} is none of the corpus's {L:,}: these are "
            "predictions of another corpus"
        )
    return ids, labels.astype(np.int32), np.diff(offsets)


def _is_part(path: str, root: str) -> bool:
    inside = path.removeprefix(root).strip("/").split("/")
    return path.endswith(".parquet") and REJECTED not in inside and not any(n.startswith((".", "_")) for n in inside)


def _said(metadata: dict[bytes, bytes]) -> tuple[str | None, str | None]:
    """(settings of the prediction as JSON, snapshot) that a file's schema says; nothing for what it does not say."""
    snapshot = metadata.get(b"snapshot")
    try:
        said = json.loads(metadata[b"settings"])
        # A scoring job's settings are those of the prediction, and more beside them.
        prediction = PredictionSection.model_validate(said.get("settings", said))
    except (KeyError, ValueError, AttributeError):
        return None, snapshot.decode() if snapshot else None
    return prediction.model_dump_json(by_alias=True), snapshot.decode() if snapshot else None


def by_row(written: PredictedRows, corpus: Corpus) -> tuple[np.ndarray, int]:
    """(int32 [B, depth], the labels of each test row less its filter pairs, −1 for none; depth). Raises ValueError."""
    row, filtered = _test_rows(written, corpus), corpus.test.filtered
    lengths = np.diff(written.offsets)
    left = np.empty_like(lengths)
    predicted = np.full((len(row), DEPTH), -1, np.int32)
    for start in range(0, len(row), BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, len(row)))
        there_BW = np.arange(lengths[block].max()) < lengths[block, None]
        labels_BW = np.full(there_BW.shape, -1, np.int32)
        labels_BW[there_BW] = written.labels[written.offsets[block.start] : written.offsets[block.stop]]
        in_order = np.sort(labels_BW, axis=1)
        doubled = np.flatnonzero(((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any(1))
        if len(doubled):
            place = start + int(doubled[0])
            where = f"{written.names[written.files[place]]}, id {written.ids[place].as_py()!r}"
            raise ValueError(f"{where}: a label is there twice: each is predicted once for a row")
        dropped_BW = ~there_BW | look_up(labels_BW, filtered[row[block]])
        left[block] = (~dropped_BW).sum(1)
        order = np.argsort(dropped_BW, axis=1, kind="stable")[:, :DEPTH]
        best = np.where(np.take_along_axis(dropped_BW, order, 1), -1, np.take_along_axis(labels_BW, order, 1))
        predicted[row[block], : best.shape[1]] = best
    full = lengths >= written.k  # the others have all that the neighbours gave
    depth = min(DEPTH, int(left[full].min(initial=DEPTH)))
    return predicted[:, :depth], depth


def _test_rows(written: PredictedRows, corpus: Corpus) -> np.ndarray:
    """int64: the test row of each written row. Raises ValueError unless it is one to one."""
    uids = corpus.test.texts["uid"].combine_chunks().cast(pa.large_string())
    if len(uids.unique()) < len(uids):
        raise ValueError("two test rows of the corpus have the same uid: their predictions cannot be told apart")
    found = pc.index_in(written.ids, value_set=uids)
    if found.null_count:
        place = int(np.flatnonzero(found.is_null())[0])
        id_, remedy = written.ids[place].as_py(), "score the test part, with its uids as ids (--id-column)"
        if id_ == str(len(uids)) and uids[0].as_py() == "0":  # as of raw/tst_X.txt of the raw text layout
            remedy = (
                "lines of a text file are counted from 1 where they are scored, and from 0 in the corpus: score the "
                'test part as JSON lines, {"id": UID, "text": TEXT}'
            )
        raise ValueError(
            f"{written.names[written.files[place]]}: id {id_!r} is no uid of the corpus's test part "
            f"({found.null_count:,} such ids): {remedy}"
        )
    row = found.to_numpy().astype(np.int64)
    times = np.bincount(row, minlength=len(uids))
    if (times > 1).any():
        uid = int(np.argmax(times > 1))
        where = sorted({written.names[written.files[place]] for place in np.flatnonzero(row == uid)})
        raise ValueError(f"id {uids[uid].as_py()!r} is there {times[uid]} times, in {', '.join(where)}: name one run")
    if (times == 0).any():
        uid = int(np.argmax(times == 0))
        raise ValueError(
            f"{(times == 0).sum():,} test rows have no prediction, {uids[uid].as_py()!r} among them: the scoring was "
            "not finished (run it again), or rejected them"
        )
    return row
