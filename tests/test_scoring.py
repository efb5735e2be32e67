"""Offline scoring gives the library's answers, each row once, the same whoever computes it, and goes on where it was
stopped; what cannot be scored is said, and stops nothing."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import scipy.sparse as sp
from helpers import corpus_of, tiny_encoder

import raexmc_ray
from raexmc_ray.files import Folder
from raexmc_ray.inputs import units
from raexmc_ray.inputs.job import Summary, Task, find_files
from raexmc_ray.inputs.rows import Columns
from raexmc_ray.inputs.units import cut_files
from raexmc_ray.memory.pool import ShardPool
from raexmc_ray.memory.snapshot import LABELS, open_snapshot
from raexmc_ray.recipe import ClusterSection, Precision, PredictionSection
from raexmc_ray.score.run import ScoreJob, _UnitScorer, score

SETTINGS = PredictionSection(k=5, temperature=0.08)


def run(
    memory: Path,
    inputs: list[str | Path],
    output: Path,
    encoders: int = 2,
    evidence: int = 2,
    precision: Precision = "auto",
) -> Summary:
    cluster = ClusterSection(encoders=encoders)
    places = [str(given) for given in inputs]
    return score(
        Folder.at(memory), places, Folder.at(output), SETTINGS, cluster, evidence=evidence, precision=precision
    )


def parts(output: Path) -> dict[str, bytes]:
    """{file: bytes} of what a job computes."""
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*.parquet"))}


@pytest.fixture
def inputs(tmp_path: Path, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the test texts in two files, four units of them, and three rows that cannot be scored."""
    monkeypatch.setattr(units, "UNIT_ROWS", 16)
    folder = tmp_path / "inputs"
    (folder / "sub").mkdir(parents=True)
    ids = [f"a{i}" for i in range(len(tiny_texts))]
    pq.write_table(pa.table({"id": ids, "text": [*tiny_texts[:-1], None]}), folder / "sub/a.parquet", row_group_size=10)
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(tiny_texts[:20])]
    lines[16:18] = ['{"id": "x", "text": ""}', "{"]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


@pytest.mark.ray
def test_labels_and_evidence_have_the_beginning_of_a_long_text(ray_cluster: str, tmp_path: Path) -> None:
    corpus = corpus_of(sp.csr_matrix(np.eye(2, dtype=np.float32)))
    texts, label_texts = ["an instance " * 200, "another one"], ["a label " * 200, "another label"]
    train = replace(corpus.train, texts=corpus.train.texts.set_column(1, "text", pa.array(texts)))
    labels = corpus.labels.set_column(1, "text", pa.array(label_texts))
    raexmc_ray.build(replace(corpus, train=train, labels=labels), tiny_encoder(), tmp_path / "memory")
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "text": "an instance"}) + "\n")
    run(tmp_path / "memory", [tmp_path / "a.jsonl"], tmp_path / "out", encoders=1, evidence=9)
    (row,) = pq.read_table(tmp_path / "out/predictions").to_pylist()
    said = {vote["uid"]: vote["text"] for votes in row["evidence"] for vote in votes}
    assert said["x0"] == texts[0][:999] + "\u2026"
    assert said["x1"] == texts[1]
    shown = dict(zip(row["label_uids"], row["label_texts"], strict=True))
    assert shown == {"z0": label_texts[0][:999] + "\u2026", "z1": label_texts[1]}


@pytest.mark.ray
def test_scores_equal_the_librarys_whoever_computes_them(
    ray_cluster: str, small_memory: Path, inputs: Path, tiny_texts: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    summary = run(small_memory, [inputs / "sub/a.parquet", inputs / "b.jsonl.gz"], output)
    memory = raexmc_ray.open(small_memory)
    assert (summary.rows, summary.results, summary.files, summary.parts) == (60, 57, 2, 5)
    assert summary.rejected == {"the line is not JSON": 1, "the text is empty": 1, "the text is null": 1}
    assert summary == Summary.model_validate_json((output / "summary.json").read_bytes())
    assert str(summary).startswith("57 of 60 rows, 3 rejected (1 the line is not JSON, ")

    found = pq.read_table(output / "predictions")
    texts = [*tiny_texts[:16], *tiny_texts[18:20], *tiny_texts[:-1]]  # b.jsonl.gz comes before sub/
    expected = memory.predict(texts, k=5, temperature=0.08, evidence=2)
    assert found["id"].to_pylist() == [str(i) for i in (*range(16), 18, 19)] + [f"a{i}" for i in range(39)]
    for row, labels in zip(found.to_pylist(), expected, strict=True):
        assert row["labels"] == [label.label for label in labels]
        assert row["label_uids"] == [label.uid for label in labels]
        assert row["label_texts"] == [label.text for label in labels]
        assert np.allclose(row["scores"], [label.score for label in labels], atol=1e-5)
        for votes, label in zip(row["evidence"], labels, strict=True):
            for vote, key in zip(votes, label.evidence or [], strict=True):
                exact = {name: value for name, value in key.model_dump().items() if name not in ("similarity", "share")}
                assert exact.items() <= vote.items()
                assert np.allclose([vote["similarity"], vote["share"]], [key.similarity, key.share], atol=1e-5)
    part = pq.read_schema(output / "predictions/part-00001-000002.parquet").metadata
    assert part[b"snapshot"].decode() == memory.manifest.id
    assert json.loads(part[b"settings"])["settings"]["k"] == 5
    assert json.loads(part[b"input"])["file"] == str(inputs / "sub/a.parquet")
    assert part[b"first_row"] == b"33"
    rejected = pq.read_table(output / "rejected").to_pylist()
    assert [(Path(row["file"]).name, row["row"], row["id"], row["reason"]) for row in rejected] == [
        ("b.jsonl.gz", 17, "x", "the text is empty"),
        ("b.jsonl.gz", 18, None, "the line is not JSON"),
        ("a.parquet", 40, "a39", "the text is null"),
    ]

    whole, again = parts(output), tmp_path / "again"
    shutil.copytree(output, again)  # as a run would leave it that was killed after one part
    kept = again / "predictions/part-00001-000001.parquet"
    for path in [again / "summary.json", *again.rglob("*.parquet")]:
        if path != kept:
            path.unlink()
    (again / "predictions/.part-00001-000000.parquet.abc").write_bytes(b"half of it")
    before = kept.stat().st_mtime_ns
    gone_on = run(small_memory, [f"{inputs}/*/*.parquet", inputs / "b.jsonl.gz"], again, encoders=1)
    assert parts(again) == whole, "neither order nor number of actors matter"
    assert not list(again.rglob(".*"))
    assert kept.stat().st_mtime_ns == before, "what was there is not computed again"
    assert gone_on.last_run.rows == 60 - 16
    assert gone_on.model_copy(update={"last_run": summary.last_run}) == summary
    assert run(small_memory, [inputs], again) == gone_on, "nothing is left to do"


@pytest.mark.ray
def test_it_scores_in_the_precision_that_it_is_given(
    ray_cluster: str, small_memory: Path, inputs: Path, tiny_texts: list[str], tmp_path: Path
) -> None:
    run(small_memory, [inputs / "sub"], tmp_path / "out", precision="bfloat16")
    scores = pq.read_table(tmp_path / "out/predictions")["scores"].to_pylist()
    expected = raexmc_ray.open(small_memory).predict(tiny_texts[:-1], k=5, temperature=0.08)
    apart = [np.subtract(row, [label.score for label in labels]) for row, labels in zip(scores, expected, strict=True)]
    assert 1e-5 < np.abs(np.concatenate(apart)).max() < 0.01


def test_an_output_holds_one_job(
    small_memory: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with pytest.raises(ValueError, match="no such file"):
        run(small_memory, [inputs, tmp_path / "none.txt"], output)
    (inputs / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"torn\.parquet: is torn"):
        run(small_memory, [inputs], output)
    assert not output.exists(), "a job that is refused leaves nothing behind"
    (inputs / "torn.parquet").unlink()
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="there is no row"):
        run(small_memory, [tmp_path / "empty.txt"], output)

    monkeypatch.setattr("raexmc_ray.score.run._score_units", lambda *_: iter(()))  # killed before the first unit
    with pytest.raises(ValueError, match="5 parts were removed"):
        run(small_memory, [inputs], output)
    (output / "rejected").mkdir()
    (output / "rejected/part.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"rejected/part\.parquet: is none of this job's parts"):
        run(small_memory, [inputs], output)
    (output / "rejected/part.parquet").unlink()
    with pytest.raises(ValueError, match=r"is of another job: evidence was 2, and is 0: give another --output"):
        run(small_memory, [inputs], output, evidence=0)
    with pytest.raises(ValueError, match=r"precision was 'auto', and is 'bfloat16'"):
        run(small_memory, [inputs], output, precision="bfloat16")
    with pytest.raises(ValueError, match=r"the input .*/b\.jsonl\.gz is gone"):
        run(small_memory, [inputs / "sub"], output)
    (inputs / "c.txt").write_text("vim\n")
    with pytest.raises(ValueError, match=r"the input .*/c\.txt is new"):
        run(small_memory, [inputs], output)
    (inputs / "c.txt").unlink()
    (inputs / "b.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1, "text": "x"}'))
    with pytest.raises(ValueError, match=r"the input .*/b\.jsonl\.gz changed"):
        run(small_memory, [inputs], output)
    job = ScoreJob.model_validate_json((output / "job.json").read_bytes())
    (output / "job.json").write_text(job.model_copy(update={"snapshot": "0123456789abcdef"}).model_dump_json())
    with pytest.raises(ValueError, match=r"snapshot was '0123456789abcdef', and is .*--snapshot 0123456789abcdef"):
        run(small_memory, [inputs], output)
    (output / "job.json").write_text("{}")
    with pytest.raises(ValueError, match=r"job\.json: is torn, of another kind of job, or of another version"):
        run(small_memory, [inputs], output)

    for place, what in (("a/predictions/part.parquet", "predictions"), ("b/summary.json", r"summary\.json")):
        foreign = tmp_path / place
        foreign.parent.mkdir(parents=True)
        foreign.write_bytes(b"")
        with pytest.raises(ValueError, match=rf"there is {what} in it, but no job\.json: give another --output"):
            run(small_memory, [inputs], tmp_path / place[0])
        assert foreign.exists()


def test_an_output_among_the_inputs_hides_none_of_them(
    small_memory: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file that the job did not write is one of its inputs, or it is refused."""
    monkeypatch.setattr("raexmc_ray.score.run._score_units", lambda *_: iter(()))  # killed before the first unit
    for output in (inputs, inputs / "sub"):
        for _ in range(2):  # and started again
            with pytest.raises(ValueError, match="5 parts were removed"):
                run(small_memory, [inputs], output)
        job = ScoreJob.model_validate_json((output / "job.json").read_bytes())
        assert [Path(file.file).name for file in job.inputs] == ["b.jsonl.gz", "a.parquet"]
        (output / "job.json").unlink()
    (inputs / "sub/predictions").mkdir()
    (inputs / "sub/a.parquet").rename(inputs / "sub/predictions/part-00000.parquet")
    with pytest.raises(ValueError, match=r"there is predictions in it, but no job\.json"):
        run(small_memory, [inputs], inputs / "sub")
    with pytest.raises(ValueError, match=r"sub: there is no file in it that ends in .*, but for what this job writes"):
        run(small_memory, [inputs / "sub"], inputs / "sub")


@pytest.mark.faults
@pytest.mark.ray
def test_a_shard_that_comes_back_to_a_damaged_snapshot_ends_the_job_with_what_is_wrong(
    ray_cluster: str, small_memory: Path, tmp_path: Path
) -> None:
    """Not with Ray Data's trace of it."""
    memory = Folder.at(shutil.copytree(small_memory, tmp_path / "memory"))
    opened, rows = open_snapshot(memory), tmp_path / "a.jsonl"
    rows.write_text(json.dumps({"id": "a", "text": "a text editor"}) + "\n")
    files = find_files([str(rows)], Folder.at(tmp_path / "out"), ScoreJob)
    said = {"evidence": 0, "precision": "float32", "device": "cpu, threads: 1"}
    job = ScoreJob.over(files, Columns(), snapshot=opened.manifest.id, settings=SETTINGS, **said)
    units_of_file = cut_files(files, Columns())[0].table(0, np.array([0]))
    labels = ray.put(pq.read_table(opened.file(LABELS), columns=["uid", "text"]).combine_chunks())
    with ShardPool(memory, opened) as pool:
        worker = _UnitScorer(Task(Folder.at(tmp_path / "out"), files, job), memory, pool, labels, 1, False)
        Path((opened.folder / "segments/0000/shard-0001/keys.arrow").path).write_bytes(b"torn")
        os.kill(ray.get(pool.actors[1].pid.remote()), signal.SIGKILL)
        (error,) = worker(units_of_file)["error"]
    assert "shard-0001/keys.arrow: has 4 bytes, the manifest says" in error
    assert "\n" not in error
