"""Labels are found by how they begin, however that is written."""

from __future__ import annotations

import pyarrow as pa

from raexmc_ray.label_lookup import LabelLookup


def test_labels_are_found_in_any_case_of_any_script() -> None:
    texts = ["ΟΔΟΣ", "οδός", "İzmir", "izmir", "Straße"]
    lookup = LabelLookup(pa.table({"index": range(5), "uid": list("abcde"), "text": texts}))
    for prefix, found in (
        *((prefix, [0]) for prefix in ("ΟΔΟΣ", "οδος", "οδοσ", "Οδο")),
        *((prefix, [2, 3]) for prefix in ("İz", "iz", "IZMIR")),
        ("ΟΔ", [0, 1]),
        ("STRA", [4]),
        ("straß", [4]),
    ):
        assert sorted(lookup.starting_with(prefix, 10)) == found, prefix


def test_labels_are_found_however_their_accents_are_spelled() -> None:
    """As one character, or as a letter and its accent: files, systems and keyboards differ."""
    texts = ["caf\u00e9 au lait", "cafe\u0301 noir", "Cafeteria", "\u01f0", "각"]
    lookup = LabelLookup(pa.table({"index": range(5), "uid": list("abcde"), "text": texts}))
    for prefix, found in (
        ("caf\u00e9", [0, 1]),
        ("CAFE\u0301", [0, 1]),
        ("caf\u00e9 n", [1]),
        ("cafe", [2]),
        ("J\u030c", [3]),
        ("\u1100\u1161\u11a8", [4]),
    ):
        assert sorted(lookup.starting_with(prefix, 10)) == found, prefix
