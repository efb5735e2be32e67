"""Labels by their uid, and by how their text or uid begins."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class LabelLookup:
    """Finds labels in an Arrow table (index, uid, text) of millions: two orders of 4 bytes a label, no dictionary."""

    def __init__(self, labels: pa.Table) -> None:
        # Large strings: of plain ones a column holds two gigabytes, and what can be folded is two thirds of that.
        strings = {name: labels[name].cast(pa.large_string()) for name in ("uid", "text")}
        self.table = pa.table({"index": labels["index"], **strings}).combine_chunks()
        self._uids = _Sorted(self.table["uid"])
        self._texts = _Sorted(_fold(self.table["text"]))

    def __len__(self) -> int:
        return len(self.table)

    def find(self, uid: str) -> int | None:
        """The index of the label with this uid; None where there is none."""
        found = self._uids.from_(uid, 1)
        return found[0] if found and self._uids.value(found[0]) == uid else None

    def starting_with(self, prefix: str, limit: int) -> list[int]:
        """Indices of labels whose text (in any case) or uid begins with `prefix`, the texts' in their order first."""
        texts = self._texts.from_(_fold(pa.scalar(prefix)).as_py(), limit, prefix=True)
        return list(dict.fromkeys([*texts, *self._uids.from_(prefix, limit, prefix=True)]))[:limit]


def label_rows(labels: pa.Table, indices: list[int]) -> list[dict[str, str | int]]:
    """[{"label", "uid", "text"}] of these labels, by an Arrow table (index, uid, text) of all."""
    rows = labels.select(["uid", "text"]).take(indices).to_pylist() if indices else []
    return [{"label": index, **row} for index, row in zip(indices, rows, strict=True)]


def _fold(text: pa.ChunkedArray | pa.Scalar) -> pa.ChunkedArray | pa.Scalar:
    """Text in which neither case makes a difference nor whether a letter and its accent are one character or two.
    Character by character, as Python's `str.lower` is not: a prefix's fold is a prefix of the fold, unless it ends
    between a letter and its accent. By way of upper case, since Greek has two small letters for one."""
    return pc.utf8_normalize(pc.utf8_lower(pc.utf8_upper(text)), form="NFC")


class _Sorted:
    """A column of large strings and the order that sorts it."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._values = column.combine_chunks()
        self._order = pc.sort_indices(self._values).to_numpy().astype(np.int32)

    def value(self, index: int) -> str:
        return self._values[index].as_py()

    def from_(self, start: str, limit: int, prefix: bool = False) -> list[int]:
        """Indices of the first `limit` values that are not before `start`; with `prefix`, only those it begins."""
        # As Arrow sorts: by the bytes of UTF-8.
        place = bisect_left(self._order, start.encode(), key=lambda i: self._values[int(i)].as_py().encode())
        found = [int(i) for i in self._order[place : place + limit]]
        return [i for i in found if self.value(i).startswith(start)] if prefix else found
