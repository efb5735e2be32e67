"""`raexmc tune`: rows that may be looked at, own keys masked, and a new snapshot that is there whole or not at all."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from conftest import Rounds, tiny_settings
from helpers import corpus_of, publish_keys, random_relevance, tiny_encoder, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import raexmc_ray
from raexmc_ray.corpus import Corpus, read_corpus
from raexmc_ray.evaluation.held_out import held_out_rows
from raexmc_ray.evaluation.sweep import choose, grid
from raexmc_ray.evaluation.tune import Tuned, publish_tuned, tune
from raexmc_ray.files import Folder
from raexmc_ray.local import Memory
from raexmc_ray.memory.defaults import with_defaults
from raexmc_ray.memory.shard import LocalShards
from raexmc_ray.memory.snapshot import list_snapshots, open_snapshot, verify
from raexmc_ray.memory.write import build_memory
from raexmc_ray.recipe import LexicalSection, MemorySection, Neighbours, PredictionSection, Recipe

BUILT = MemorySection(shards=2, lexical=LexicalSection(weight=0.3))
OTHER = PredictionSection(lambda_=0.35, temperature=0.11, neighbours=Neighbours(instances=30, labels=20), k=5)


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Path) -> Corpus:
    return read_corpus(tiny_corpus)


@pytest.fixture(scope="module")
def built(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "memory"
    build_memory(corpus, tiny_encoder(), folder, BUILT)
    return folder


@pytest.fixture(scope="module")
def memory(built: Path) -> Memory:
    return raexmc_ray.open(built, (built / "CURRENT").read_text().strip())


def recipe_of(folder: Path, storage: Path, **section: object) -> Recipe:
    return Recipe.parse({**tiny_settings(folder, storage), **section})


def trained(storage: Path, recipe: Recipe, corpus: Corpus) -> None:
    """As if a training by this recipe on this corpus had made the tiny encoder."""
    folder = storage / "encoders/some"
    folder.mkdir(parents=True, exist_ok=True)
    details = {"fingerprint": tiny_encoder().fingerprint, "corpus": corpus.fingerprint}
    content = recipe.model_dump(mode="json", by_alias=True)
    (folder / "trained.json").write_text(json.dumps({**details, "recipe": content}))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), b=st.integers(1, 12))
def test_a_masked_key_is_as_if_it_were_not_there(tmp_path_factory: pytest.TempPathFactory, seed: int, b: int) -> None:
    rng = np.random.default_rng(seed)
    keys, relevance = unit_rows(rng, 14, 8), random_relevance(rng, 9, 5)
    shards = LocalShards(publish_keys(tmp_path_factory.mktemp("masked"), keys, relevance, 2))
    queries, own = keys[:9], np.arange(9)
    deepest = shards.search(queries, Neighbours(instances=9, labels=5))
    for neighbours in (Neighbours(joint=b), Neighbours(instances=min(b, 9), labels=min(b, 5))):
        cut = deepest.cut(neighbours, own)
        for row in range(9):
            found = cut.key_ids_Bb[row][cut.key_ids_Bb[row] >= 0].tolist()
            scores = {key: float(np.float32(keys[key].astype(float) @ keys[row].astype(float))) for key in range(14)}
            ranked = [key for key in sorted(scores, key=lambda key: (-scores[key], key)) if key != row]
            if neighbours.joint:
                assert found == ranked[:b]
            else:
                instances = [key for key in ranked if key < 9][: neighbours.instances]
                labels = [key for key in ranked if key >= 9][: neighbours.labels]
                assert found == sorted(instances + labels, key=ranked.index)


def test_which_rows(tiny_corpus: Path, corpus: Corpus, memory: Memory, tmp_path: Path) -> None:
    plain = recipe_of(tiny_corpus, tmp_path)

    untrained = held_out_rows(plain, corpus, memory)
    assert untrained.warning is None
    assert "less its own key" in untrained.said
    assert untrained.own_keys is not None
    assert untrained.split.texts["uid"].to_pylist() == corpus.train.texts["uid"].take(untrained.own_keys).to_pylist()

    another = recipe_of(tiny_corpus, tmp_path, encoder={"layers": 2, "max_tokens": 16})
    assert "not known" in str(held_out_rows(another, corpus, memory).warning)

    trained(tmp_path, plain, corpus)
    assert "trained on these rows" in str(held_out_rows(plain, corpus, memory).warning)

    aside = recipe_of(tiny_corpus, tmp_path, training={"evaluation": {"every": 1, "holdout": 0.2}, "seed": 3})
    trained(tmp_path, aside, Corpus(corpus.train.take(np.arange(200)), corpus.test, corpus.labels))
    assert "or most" in str(held_out_rows(plain, corpus, memory).warning), "of more rows, it kept others aside"
    trained(tmp_path, aside, corpus)
    kept_aside = held_out_rows(plain, corpus, memory)
    expected = corpus.hold_out(0.2, seed=4).test  # as the trainer holds out: its seed plus one
    assert kept_aside.warning is None
    assert kept_aside.own_keys is not None
    uids = kept_aside.split.texts["uid"].to_pylist()
    assert set(uids) <= set(expected.texts["uid"].to_pylist())
    assert uids == corpus.train.texts["uid"].take(kept_aside.own_keys).to_pylist()

    assert len(held_out_rows(plain, corpus, memory, rows=7).split) == 7


def test_a_corpus_holdout_comes_first_and_another_corpus_is_refused(
    tiny_corpus: Path, corpus: Corpus, memory: Memory, tmp_path: Path
) -> None:
    held = recipe_of(tiny_corpus, tmp_path, corpus={"path": str(tiny_corpus), "holdout": 0.25})
    part = corpus.hold_out(0.25)
    with pytest.raises(ValueError, match="is not of this corpus"):
        held_out_rows(held, part, memory)
    build_memory(part, tiny_encoder(), tmp_path / "memory")
    other = raexmc_ray.open(tmp_path / "memory")
    rows = held_out_rows(held, part, other)
    assert rows.own_keys is None
    assert rows.warning is None
    assert set(rows.split.texts["uid"].to_pylist()) <= set(part.test.texts["uid"].to_pylist())
    elsewhere = recipe_of(
        tiny_corpus, tmp_path, corpus={"path": str(tiny_corpus), "holdout": 0.25}, encoder={"layers": 2}
    )
    assert "not known" in str(held_out_rows(elsewhere, part, other).warning)
    trained(tmp_path, recipe_of(tiny_corpus, tmp_path), corpus)
    assert "another corpus.holdout" in str(held_out_rows(held, part, other).warning)


def test_labels_of_no_other_row_are_neither_right_nor_wrong() -> None:
    relevance = sp.csr_matrix(np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], np.float32))
    split = corpus_of(relevance).train.without_unseen(np.array([False, True, False]))
    assert split.relevance.toarray().tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert split.filtered.toarray().tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


@pytest.fixture(scope="module")
def tuned(tiny_corpus: Path, corpus: Corpus, memory: Memory, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    recipe = recipe_of(tiny_corpus, tmp_path_factory.mktemp("none"))
    blind = Corpus(corpus.train, corpus.test.take(np.arange(0)), corpus.labels)  # there is no test part to look at
    return tune(memory, blind, recipe.corpus, held_out_rows(recipe, blind, memory, rows=120))


def test_it_does_not_get_worse_and_says_on_what(tuned: Tuned, memory: Memory) -> None:
    assert tuned.before == memory.manifest.defaults
    assert re.fullmatch(r"\d+ rows of training rows, each less its own key", tuned.rows)
    swept = {tuned.before: tuned.figures_before, tuned.after: tuned.figures_after}
    assert choose(swept) == tuned.after != tuned.before
    assert tuned.tried > 100


def test_of_equal_settings_the_first_is_chosen() -> None:
    swept = {one: dict.fromkeys(("P@1", "P@5", "PSP@1", "PSP@5", "R@10"), 0.0) for one in grid(OTHER, (0.1, 0.2))}
    assert choose(swept) == next(iter(swept))
    last = list(swept)[-1]
    swept[last] = {**swept[last], "PSP@1": 1.0}
    assert choose(swept) == last
    assert choose(swept, ["P@1"]) == next(iter(swept))


def test_the_new_snapshot_answers_by_them_and_the_old_one_stays(
    built: Path, corpus: Corpus, memory: Memory, tuned: Tuned
) -> None:
    texts = corpus.test.texts["text"].to_pylist()
    chosen, old = tuned.after, memory.manifest.id
    before = memory.predict(texts)
    expected = memory.predict(
        texts, lambda_=chosen.lambda_, temperature=chosen.temperature, neighbours=chosen.neighbours
    )
    done = publish_tuned(Folder.at(built), memory.snapshot, corpus, tuned)
    assert done.snapshot_after == (built / "CURRENT").read_text().strip() != old
    assert raexmc_ray.open(built).predict(texts) == expected
    assert raexmc_ray.open(built, old).predict(texts) == before
    assert sum(verify(open_snapshot(built))) > 0
    models = [built / "snapshots" / name / "encoder/model.safetensors" for name in (old, str(done.snapshot_after))]
    assert models[0].samefile(models[1]), "no second copy"
    assert build_memory(corpus, tiny_encoder(), built, BUILT, chosen) == done.snapshot_after
    models[1].unlink()
    assert publish_tuned(Folder.at(built), memory.snapshot, corpus, tuned) == done
    assert models[0].samefile(models[1]), "a damaged one is made anew"
    assert sum(verify(open_snapshot(built))) > 0
    assert with_defaults(Folder.at(built), memory.snapshot, corpus.fingerprint, memory.manifest.defaults) == old
    assert (built / "CURRENT").read_text().strip() == old
    unchanged = tuned.model_copy(update={"after": tuned.before})
    assert publish_tuned(Folder.at(built), memory.snapshot, corpus, unchanged) == unchanged, "it was best already"


KILLED = """
import os, signal, sys
from raexmc_ray.files import Folder
from raexmc_ray.memory import defaults, snapshot
from raexmc_ray.recipe import PredictionSection
memory, after = Folder.at(sys.argv[1]), int(sys.argv[2])
calls = 0
def count(call):
    def counted(*arguments, **named):
        global calls
        calls += 1
        if calls > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)
    return counted
os.link, os.replace = count(os.link), count(os.replace)
settings = PredictionSection.model_validate_json(sys.argv[4])
defaults.with_defaults(memory, snapshot.open_snapshot(memory), sys.argv[3], settings)
"""


@pytest.mark.faults
def test_killed_in_the_middle_the_old_one_is_current_and_the_same_command_goes_on(
    corpus: Corpus, tmp_path: Path
) -> None:
    old = build_memory(corpus, tiny_encoder(), tmp_path, MemorySection(shards=2))
    settings = OTHER.model_dump_json(by_alias=True)
    files = len(open_snapshot(tmp_path).manifest.files)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    last = 2 * files + 1  # after a link and a rename for each file, and the manifest: CURRENT

    def kill(done: int) -> None:
        killed = subprocess.run([*command, str(done), corpus.fingerprint, settings], check=False)
        assert killed.returncode < 0, "the test must kill"
        assert (tmp_path / "CURRENT").read_text().strip() == old
        assert sum(verify(open_snapshot(tmp_path))) > 0

    with Rounds("tuned_snapshot", short=2) as rounds:
        for _ in rounds:
            kill(random.randrange(last))
    kill(last)
    subprocess.run([*command, "1000", corpus.fingerprint, settings], check=True)
    current = open_snapshot(tmp_path)
    assert current.manifest.defaults == OTHER
    assert sum(verify(current)) > 0
    assert list_snapshots(Folder.at(tmp_path)) == sorted([old, current.manifest.id])
    folder = Path(current.folder.path)
    assert all((folder / name).is_file() for name in current.manifest.files)
    assert not list(folder.rglob(".*.shared")), "nothing half-made is left"
