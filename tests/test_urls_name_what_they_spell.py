"""A URL names the folder that a person reads in it, or is refused with its reason and without its credentials."""

from __future__ import annotations

from pathlib import Path

import pytest

from raexmc_ray.files import Folder
from raexmc_ray.inputs.find import find_inputs

NAMES = ("a b", "ä", "a#1", "x[1]", "{a}", "100%", "a%2", "a|b^c`d", 'a"b', "a\\b", "a+b,c;d=e&f@g!$'()*~", "日本")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("root", ["s3://key:secret@bucket/", "file:///"])
def test_what_a_url_cannot_spell_stands_for_itself(root: str, name: str) -> None:
    query = "?region=us-east-1&endpoint_override=[::1]:9000" if root.startswith("s3") else ""
    folder = Folder.at(f"{root}in/{name}/sub{query}")
    assert folder.path == root.rpartition("@")[2].removeprefix("file://") + f"in/{name}/sub"
    assert Folder.at(f"{root}a%20b%5B1%5D%25{query}").path.endswith("a b[1]%"), "and what is spelled is read so"


def test_a_glob_with_brackets_may_be_a_url(tmp_path: Path) -> None:
    for name in ("a 1.txt", "b 1.txt", "c 1.txt"):
        (tmp_path / name).write_text("vim\n")
    assert [file.file.name for file in find_inputs([f"file://{tmp_path}/[ab] *.txt"])] == ["a 1.txt", "b 1.txt"]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://key:secret@host/memory", "Unrecognized filesystem type in URI: http://host/memory"),
        ("s3://key:secret@bucket/a?regoin=x", "Unexpected query parameter in S3 URI: 'regoin'"),
        ("s3:///bucket/a", "Missing bucket name in S3 URI"),
    ],
)
def test_a_url_of_no_filesystem_is_refused_without_its_credentials(url: str, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        Folder.at(url)
    assert str(refused.value) == f"{says}: give a path of this machine, or an s3:// or gs:// URL"
