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
from raexmc_ray.evaluation.measure import BOTH, DEPTH, POPULARITY, measure, popular, refuse_unlabelled
from raexmc_ray.evaluation.result import Measured
from raexmc_ray.evaluation.retrieve import Stopwatch
from raexmc_ray.files import Folder
from raexmc_ray.metrics import PRECISION_AT, RECALL_AT
from raexmc_ray.ragged import rank_in_row
from raexmc_ray.recipe import CorpusSection, PredictionSection, Recipe

PREDICTIONS = "evaluation-predictions.json"
REJECTED = "rejected"
"""The folder of rows that could not be scored."""
logger = logging.getLogger("raexmc_ray")


@dataclass(frozen=True)
class Written:
    """Predictions as they are in their files.

    ids: strings, one a row. labels: integers, of all rows one after the other, the best first; offsets: int64.
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
    need more labels than were predicted are left out, which is logged. Raises ValueError where a row has no
    prediction, or two, or a prediction is of no row.
    """
    refuse_unlabelled(corpus)
    clock = Stopwatch()
    with clock.stage("read"):
        written = read_predictions(folder)
        predicted, depth = _by_row(written, corpus)
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
        recipe=recipe,
    )


def read_predictions(folder: Folder) -> Written:
    """All predictions under a folder, in the order of the files' paths. Raises FileNotFoundError, ValueError."""
    selector = pafs.FileSelector(folder.path, recursive=True, allow_not_found=True)
    paths = sorted(info.path for info in folder.filesystem.get_file_info(selector) if _is_part(info.path, folder.path))
    if not paths:
        raise FileNotFoundError(f"no predictions under {folder}: there is no Parquet file; `raexmc score` writes them")
    tables, said = [], set()
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
        tables.append(table.replace_schema_metadata())
    settings, snapshot = said.pop() if len(said) == 1 else (None, None)
    if said:
        raise ValueError(f"{folder}: has predictions of several runs ({len(said)} settings or snapshots): name one")
    lists = [table["labels"].combine_chunks().cast(pa.large_list(pa.int64())) for table in tables]
    lengths = np.concatenate([np.diff(part.offsets.to_numpy()) for part in lists])
    read = PredictionSection.model_validate_json(settings) if settings else None
    return Written(
        pa.concat_arrays([table["id"].combine_chunks().cast(pa.large_string()) for table in tables]),
        np.concatenate([part.flatten().to_numpy() for part in lists]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.repeat(np.arange(len(paths)), [len(table) for table in tables]),
        paths,
        read.k if read else int(lengths.max(initial=0)),
        read,
        snapshot,
    )


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


def _by_row(written: Written, corpus: Corpus) -> tuple[np.ndarray, int]:
    """(int32 [B, depth], the labels of each test row less its filter pairs, −1 for none; depth). Raises ValueError."""
    row = _test_rows(written, corpus)
    lengths = np.diff(written.offsets)
    of_label = np.repeat(row, lengths)
    L = len(corpus.labels)
    if len(written.labels) and not (written.labels.min() >= 0 and written.labels.max() < L):
        wrong = np.flatnonzero((written.labels < 0) | (written.labels >= L))[0]
        place = int(np.searchsorted(written.offsets, wrong, side="right")) - 1
        raise ValueError(
            f"{written.names[written.files[place]]}, id {written.ids[place].as_py()!r}: label {written.labels[wrong]} "
            f"is none of the corpus's {L:,}: these are predictions of another corpus"
        )
    filtered = corpus.test.filtered
    pairs = np.repeat(np.arange(len(corpus.test)), np.diff(filtered.indptr)) * L + filtered.indices
    kept = ~np.isin(of_label * L + written.labels, pairs)
    of_label, label = of_label[kept], written.labels[kept]
    left = np.bincount(of_label, minlength=len(corpus.test))
    asked_for = np.empty(len(corpus.test), np.int64)
    asked_for[row] = lengths
    full = asked_for >= written.k  # the others have all that the neighbours gave
    depth = min(DEPTH, int(left[full].min(initial=DEPTH)))
    order = np.argsort(of_label, kind="stable")
    of_label, label = of_label[order], label[order]
    rank = rank_in_row(of_label)
    predicted = np.full((len(corpus.test), depth), -1, np.int32)
    top = rank < depth
    predicted[of_label[top], rank[top]] = label[top]
    in_order = np.sort(predicted, axis=1)
    doubled = np.flatnonzero(((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any(1))
    if len(doubled):
        place = int(np.flatnonzero(row == doubled[0])[0])
        where = f"{written.names[written.files[place]]}, id {written.ids[place].as_py()!r}"
        raise ValueError(f"{where}: a label is there twice: each is predicted once for a row")
    return predicted, depth


def _test_rows(written: Written, corpus: Corpus) -> np.ndarray:
    """int64: the test row of each written row. Raises ValueError unless it is one to one."""
    uids = corpus.test.texts["uid"].combine_chunks().cast(pa.large_string())
    if len(uids.unique()) < len(uids):
        raise ValueError("two test rows of the corpus have the same uid: their predictions cannot be told apart")
    found = pc.index_in(written.ids, value_set=uids)
    if found.null_count:
        place = int(np.flatnonzero(found.is_null())[0])
        raise ValueError(
            f"{written.names[written.files[place]]}: id {written.ids[place].as_py()!r} is no uid of the corpus's test "
            f"part ({found.null_count:,} such ids): score the test part, with its uids as ids (--id-column)"
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
