"""`mser translate`: what the set holds, that it goes on after a stop, and is the same however it was run."""

import csv
import json
from pathlib import Path

import pytest

from mser_dist import audio, files
from mser_dist.cli import main as cli
from mser_dist.errors import Stopped, UserError
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.verify import verify
from mser_dist.translation.job import Share, share_of
from tests.unit.made_up_recordings import PROGRAM, asked_for, config, run, same, write_set

NAMES = {f"a{i:02d}": ("train", "train", "val", "test")[i % 4] for i in range(44)}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("recordings") / "set", NAMES)


@pytest.fixture(scope="module")
def whole(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set of an undisturbed run, with `asked`, the folder of its program, beside it."""
    folder = tmp_path_factory.mktemp("whole")
    run(recordings, folder / "out", config(folder))
    return folder


def test_a_clip_of_each_recording_in_each_language(whole: Path, recordings: Path) -> None:
    out = whole / "out"
    assert not verify(str(out)) and not out.with_name("out.made").exists()
    shards = ShardSet.open([str(out)])
    assert sorted(shards.keys) == sorted(
        f"{key}_{to}" for key, split in NAMES.items() if split != "test" for to in ("de", "fr")
    )
    sources = ShardSet.open([str(recordings)])
    for i in range(len(shards)):
        sample = shards.read(i)
        [origin] = [k for k in range(len(sources)) if sources.key(k) == sample.key[:3]]
        meta, of = sample.meta, sources.read(origin).meta
        assert {
            name: meta[name] for name in ("label", "emotion", "speaker", "gender", "corpus", "source_id", "split")
        } == {name: of[name] for name in ("label", "emotion", "speaker", "gender", "corpus", "source_id", "split")}
        assert meta["synthetic"] and meta["language"] == sample.key[4:]
        assert meta["text"] == {"de": "Die Katze schläft.", "fr": "Le chat dort."}[meta["language"]]
        told = meta["translation"]
        assert (
            told["source"] == sample.key[:3]
            and told["source_text"] == "The cat sleeps."
            and told["transcript"] == "text"
        )
        assert told["text"]["name"] == "table" and told["text"]["sha256"]
        assert (told["speech"]["program"], told["speech"]["version"]) == ("whistle", "1.0")
        assert told["measures"]["seconds"] == meta["duration"] == 0.5
        assert len(audio.decode(sample.audio, "")) == 8000
    assert len(set(shards.source)) == 33, "a recording and its translations are parallel clips"
    assert set(shards.source) <= set(sources.source)


def test_the_set_tells_what_it_is(whole: Path) -> None:
    out = whole / "out"
    facts = json.loads((out / "dataset.json").read_text(encoding="utf-8"))["made_by"]
    assert facts["sources"] == [{"corpus": "ravdess", "language": "en", "clips": 33, "licence": "CC BY-NC-SA 4.0"}]
    assert facts["left_out"] == {"split test": 11}
    assert facts["selection"]["fr"] == {"anger": {"kept": 11}, "happy": {"kept": 22}}
    assert facts["config"]["to"] == ["de", "fr"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "CC BY-NC-SA 4.0" in card and "No commercial use" in card and "whistle" in card and "split test: 11" in card
    rows = list(csv.DictReader((out / "selection.csv").open(encoding="utf-8")))
    assert len(rows) == 66 and {row["outcome"] for row in rows} == {"kept"} and rows[0]["from"] == "en"
    assert (out / "selection_language.svg").read_text(encoding="utf-8").count("<svg") == 1


def test_every_shard_has_its_share_of_each_language(whole: Path, recordings: Path, tmp_path: Path) -> None:
    run(recordings, tmp_path / "out", config(tmp_path, shard_clips=10))
    for shard in sorted((tmp_path / "out").glob("train-*.tar"))[:-1]:
        index = json.loads(Path(f"{shard}.idx.json").read_text(encoding="utf-8"))["columns"]["language"]
        assert sorted(index["codes"]) == [0] * 5 + [1] * 5
    assert not verify(str(tmp_path / "out"))


def test_stopped_and_gone_on_with_it_is_the_same(tmp_path: Path) -> None:
    source = write_set(tmp_path / "set", {("stops" if key == "a32" else key): split for key, split in NAMES.items()})
    asked, undisturbed, out = config(tmp_path), tmp_path / "undisturbed", tmp_path / "out"
    (tmp_path / "once/stops").touch()
    run(source, undisturbed, asked)
    (tmp_path / "once/stops").unlink()
    with pytest.raises(Stopped, match="goes on"):
        run(source, out, asked)
    assert not out.exists() and [path.name for path in (tmp_path / "out.made").glob("*.tar")] == ["train-000000.tar"]
    before = len(asked_for(tmp_path))
    run(source, out, asked)
    assert len(asked_for(tmp_path)) - before == 2 * (33 - 16), "a block that was whole is not made anew"
    assert same(out, undisturbed)


def test_parts_make_the_same_set(
    whole: Path, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, out = config(whole), tmp_path / "out"
    assert run(recordings, out, asked, part=(1, 3)) is None
    assert "other parts have" in capsys.readouterr().out and not out.exists()
    with pytest.raises(UserError, match="blocks are missing"):
        run(recordings, out, asked, merge=True)
    assert run(recordings, out, asked, part=(0, 3)) is None
    damaged = tmp_path / "out.made/train-000001.tar"
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    assert run(recordings, out, asked, part=(2, 3)) is None, "what another part has to make anew is missing"
    assert run(recordings, out, asked) is not None
    assert same(out, whole / "out")
    assert run(recordings, out, asked, part=(2, 3)) is None and "is whole" in capsys.readouterr().out


def test_the_ranks_of_a_job_share_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for part in range(2):
        for rank in range(3):
            for name, value in (("RANK", rank), ("WORLD_SIZE", 3), ("MASTER_ADDR", "x"), ("MASTER_PORT", 1)):
                monkeypatch.setenv(name, str(value))
            shares.append(share_of((part, 2)))
    assert sorted(shares) == [Share(part, 6) for part in range(6)]


def test_another_selection_makes_nothing_anew(recordings: Path, tmp_path: Path) -> None:
    asked, out = config(tmp_path), tmp_path / "out"
    run(recordings, out, asked, keep_made=True)
    before = len(asked_for(tmp_path))
    asked.selection.min_seconds = 0.6
    with pytest.raises(UserError, match="made in another way"):
        run(recordings, out, asked, keep_made=True)
    with pytest.raises(UserError, match=r"not one clip is kept \(too short: 66\)"):
        run(recordings, out, asked, keep_made=True, overwrite=True)
    assert not verify(str(out)), "the earlier set is as it was"
    asked.selection.all = True
    outcomes = run(recordings, out, asked, overwrite=True)
    assert outcomes is not None and outcomes.total("kept") == 66
    assert len(asked_for(tmp_path)) == before


def test_audio_that_was_damaged_is_made_again(recordings: Path, tmp_path: Path) -> None:
    asked, out = config(tmp_path), tmp_path / "out"
    run(recordings, out, asked, keep_made=True)
    block = tmp_path / "out.made/val-000000.tar"
    data = bytearray(block.read_bytes())
    data[700] ^= 1
    block.write_bytes(data)
    asked.selection.all = True
    with pytest.raises(UserError, match="was damaged, and is removed"):
        run(recordings, out, asked, overwrite=True)
    assert run(recordings, out, asked, overwrite=True) is not None and not verify(str(out))


def test_a_test_is_translated_where_it_is_named_and_stays_one(recordings: Path, tmp_path: Path) -> None:
    run(recordings, tmp_path / "out", config(tmp_path, split=["test", "val"]))
    shards = ShardSet.open([str(tmp_path / "out")])
    assert set(shards.column("split")) == {"test", "val"}
    assert all(NAMES[shards.key(i)[:3]] == shards.column("split")[i] for i in range(len(shards)))


def test_keys_of_any_set_become_keys(tmp_path: Path) -> None:
    from mser_dist.translation.sources import Recordings

    source = write_set(tmp_path / "set", {"a": "train"})
    there = Recordings(str(source), config(tmp_path))
    assert there.key(0, "de") == "a_de"
    there.shards.key = lambda i: "dir/é.b"  # type: ignore[method-assign]
    assert there.key(0, "de") == f"dir-b-{files.digest('dir/é.b')[:10]}_de"


def test_the_command_line(recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = config(tmp_path)
    words = [f"text.table={asked.text.table}", "speech.backend=command", f"speech.command={asked.speech.command}"]
    start = ["translate", str(recordings), str(tmp_path / "out"), "--to", "de,fr", *words, "selection.whisper=null"]
    assert cli.main([*start, "--plan", "--clips", "100000", "--price", "0.05", "--try", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 recordings, 4 clips: 4 kept" in said and "100,000" in said and "0.05 an hour" in said
    assert not (tmp_path / "out").exists()
    assert cli.main([*start, "shard_clips=7", "--keep-all"]) == 0
    said = capsys.readouterr().out
    assert "33 recordings, 66 clips in de, fr: 0 are there, 66 to make" in said and "split test: 11" in said
    assert "anger" in said and (tmp_path / "out/README.md").is_file()
    assert cli.main([*start, "--workers", "0"]) == 2
    (tmp_path / "my.yaml").write_text("to: [fr]\nseed: 3\nselection: {whisper: null}\n")
    assert cli.main(["translate", "x", "y", "--config", str(tmp_path / "my.yaml"), "speach.backend=vits"]) == 2
    assert "did you mean speech?" in capsys.readouterr().err
    assert cli.main(["config", "--keys", "translate"]) == 0
    assert "speech.timeout (float > 0) = 120.0" in capsys.readouterr().out
    assert PROGRAM.is_file()
