"""Predictions as Arrow tables: what a scoring job writes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from raexmc_ray.predict import Evidence, Predictions

VOTE = pa.struct(
    {
        "key_id": pa.int64(),
        "kind": pa.string(),
        "uid": pa.string(),
        "text": pa.string(),
        "similarity": pa.float32(),
        "share": pa.float32(),
    }
)
"""A key that voted for a label: as `answer.KeyVote`."""
PREDICTIONS = pa.schema(
    {
        "id": pa.string(),
        "labels": pa.list_(pa.int64()),
        "label_uids": pa.list_(pa.string()),
        "label_texts": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
    }
)
"""A row a text, its labels the best first."""
EVIDENCE = pa.field("evidence", pa.list_(pa.list_(VOTE)))
"""For each label the keys that voted for it, the largest share first."""


def predictions_table(
    ids: Sequence[str],
    found: Predictions,
    labels: pa.Table,
    evidence: tuple[Evidence, pa.Table] | None,
) -> pa.Table:
    """PREDICTIONS of B texts, with EVIDENCE where there is some.

    labels: (uid, text) of all labels. evidence: what voted for `found`, and a row (key_id, kind, uid, text) for each of
    its votes.
    """
    kept_Bk = found.labels_Bk >= 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(kept_Bk.sum(1))]), pa.int32())
    indices = pa.array(found.labels_Bk[kept_Bk], pa.int64())
    rows = labels.take(indices)
    columns = {
        "labels": indices,
        "label_uids": rows["uid"].combine_chunks(),
        "label_texts": rows["text"].combine_chunks(),
        "scores": pa.array(found.scores_Bk[kept_Bk], pa.float32()),
    }
    schema = PREDICTIONS
    if evidence:
        columns["evidence"] = _votes(*evidence, kept_Bk.ravel())
        schema = schema.append(EVIDENCE)
    lists = [pa.ListArray.from_arrays(offsets, values) for values in columns.values()]
    return pa.Table.from_arrays([pa.array(ids, pa.string()), *lists], schema=schema)


def _votes(evidence: Evidence, keys: pa.Table, kept: np.ndarray) -> pa.Array:
    """list<VOTE> of the cells that have a label: the others have no votes, so theirs follow one another."""
    offsets = np.concatenate([evidence.offsets[:-1][kept], evidence.offsets[-1:]])
    columns = {name: keys[name].combine_chunks() for name in ("key_id", "kind", "uid", "text")}
    columns |= {"similarity": pa.array(evidence.similarities), "share": pa.array(evidence.shares)}
    votes = pa.StructArray.from_arrays([columns[field.name].cast(field.type) for field in VOTE], fields=list(VOTE))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), votes)


def no_predictions(evidence: bool) -> pa.Table:
    """`predictions_table` of no text."""
    return (PREDICTIONS.append(EVIDENCE) if evidence else PREDICTIONS).empty_table()
