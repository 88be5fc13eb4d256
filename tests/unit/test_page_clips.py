"""The clips of an evaluation's page: the map, the worst confusions, and their sound."""

import base64
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mser_dist import audio
from mser_dist.evaluation import page, page_clips, page_map, page_sections, page_svg
from mser_dist.evaluation.evaluated import read
from mser_dist.shards.shard_set import ShardSet
from tests.unit.made_up_pages import (
    LABELS,
    Parsed,
    answers,
    evaluate,
    evaluated,
    predicted,
    sound,
    text_of,
    write_clips,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_clips(tmp_path_factory.mktemp("page") / "set")


@pytest.fixture(scope="module")
def evaluation(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluated(tmp_path_factory.mktemp("evaluation"), shards)


# ---- the map


def test_the_map_keeps_neighbours() -> None:
    group = np.arange(90) % 3
    vectors = np.random.default_rng(0).normal(size=(90, 16)) * 0.1
    vectors[np.arange(90), group] += 1
    found = page_map.flatten_map(vectors.astype(np.float16))
    assert found is not None and found.xy.shape == (90, 2) and "all 90 clips" in found.told
    distance = np.linalg.norm(found.xy[:, None] - found.xy[None], axis=2) + 1e9 * np.eye(90)
    assert (group[distance.argmin(1)] == group).mean() > 0.95
    again = page_map.flatten_map(vectors.astype(np.float16))
    assert again is not None and np.array_equal(again.xy, found.xy)


def test_a_map_of_few_of_many_and_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(20, 16)).astype(np.float16)
    few = page_map.flatten_map(vectors)
    assert few is not None and "principal components of all 20 clips" in few.told
    monkeypatch.setattr(page_map, "MOST", 8)
    some = page_map.flatten_map(vectors, seed=3)
    assert some is not None and len(some.xy) == 8 and "8 of 20 clips, drawn with seed 3" in some.told
    assert page_map.flatten_map(np.ones((50, 16), np.float16)) is None


def test_points_of_the_map(evaluation: Path) -> None:
    """Every clip of the evaluation that has embeddings, in both pictures; what is wrong says so."""
    text = text_of(evaluation)
    ((model, _, pictures),) = page_sections.maps(read(evaluation))
    assert model == "stage 1" and [sum(count for *_, count in one.legend) for one in pictures] == [24, 24]
    assert [name for _, _, name, _ in pictures[0].legend] == LABELS
    assert [name for _, _, name, _ in pictures[1].legend] == ["de", "el, not heard"]
    wrong = sum(row["label"] != row["predicted"] for row in predicted(evaluation, "stage1"))
    assert pictures[0].svg.count("taken for") == wrong and text.count("<use href") >= 48


def test_embeddings_that_do_not_fit(evaluation: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(evaluation, tmp_path / "eval")
    assert np.load(folder / "embeddings_stage1.npy").shape == (24, 8)
    for vectors, says in ((np.ones((3, 8)), "is of other clips"), (np.full((24, 8), np.nan), "are not finite")):
        np.save(folder / "embeddings_stage1.npy", vectors.astype(np.float16))
        text = text_of(folder)
        assert f"embeddings_stage1.npy {'has numbers that ' if 'finite' in says else ''}{says}" in text
        assert "map" not in Parsed(text).ids
    (folder / "embeddings_stage1.npy").write_bytes(b"no array")
    assert "embeddings_stage1.npy cannot be read" in text_of(folder)


def test_marks_differ() -> None:
    assert len({page_svg.mark(i) for i in range(28)}) == 28


# ---- the worst confusions


def test_the_worst_confusions_are_the_surest(evaluation: Path) -> None:
    evaluated = read(evaluation)
    pairs = page_clips.worst(evaluated.answers["stage2"], LABELS)
    rows = [row for row in predicted(evaluation, "stage2") if row["label"] != row["predicted"]]
    assert sum(pair.count for pair in pairs) == len(rows) > 0
    assert [pair.count for pair in pairs] == sorted((pair.count for pair in pairs), reverse=True)
    for pair in pairs:
        own = [row for row in rows if (row["label"], row["predicted"]) == (pair.label, pair.predicted)]
        margins = sorted((row[f"score_{row['predicted']}"] - row[f"score_{row['label']}"] for row in own), reverse=True)
        assert [one.margin for one in pair.worst] == pytest.approx(margins[: page_clips.EACH])
    chances = np.full((24, 3), 1 / 3, np.float32)
    chances[5] = 0.9
    sure = page_clips.worst(replace(evaluated.answers["stage2"], probability=chances), LABELS)
    assert all(one.probability is not None for pair in sure for one in pair.worst)


def test_no_recording_leaves_unless_it_is_asked_for(evaluation: Path) -> None:
    text = text_of(evaluation)
    assert "<audio" not in text and "data:" not in text and "No recording is in this file" in text


def test_recordings_can_be_heard(evaluation: Path, tmp_path: Path) -> None:
    out, notes = page.write(evaluation, audio=True, out=tmp_path / "page.html")
    assert not notes
    found = _sounds(out)
    wrong = {
        one.key
        for given in read(evaluation).answers.values()
        for pair in page_clips.worst(given, LABELS)
        for one in pair.worst
    }
    assert len(set(found)) == len(wrong)
    for uri in found:
        wave = audio.to_pcm16(audio.decode(base64.b64decode(uri), "the page"))
        assert any(np.array_equal(wave, sound(int(key[1:]))) for key in wrong), "it is the clip itself"


def _sounds(out: Path) -> list[str]:
    sources = [str(of.get("src")) for tag, of in Parsed(out.read_text(encoding="utf-8")).tags if tag == "audio"]
    assert all(one.startswith("data:audio/flac;base64,") for one in sources)
    return [one.partition(",")[2] for one in sources]


def test_recordings_are_bounded_and_may_be_gone(
    evaluation: Path, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = len(_sounds(page.write(evaluation, audio=True, out=tmp_path / "page.html")[0]))
    monkeypatch.setattr(page_clips, "BYTES", 50_000)
    out, notes = page.write(evaluation, audio=True, out=tmp_path / "page.html")
    assert 0 < len(_sounds(out)) < whole and "a page has 0.05 MB for them" in notes[0]
    monkeypatch.undo()
    away = shutil.copytree(Path(shards.shards[0].name).parent, tmp_path / "away")
    folder = evaluate(tmp_path / "eval", ShardSet.open(away), {"stage2": answers(shards, 0.5, 1)})
    shutil.rmtree(away)
    out, notes = page.write(folder, audio=True)
    assert not _sounds(out) and len(notes) == 1 and notes[0].startswith("no clip can be heard: ")
    few = write_clips(away, each=6)
    assert len(few) == 12
    out, notes = page.write(folder, audio=True)
    assert "are not in the sets any more, and cannot be heard" in notes[-1]
