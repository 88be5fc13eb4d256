import json
import tarfile
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mser_dist import audio
from mser_dist.cli import main as cli
from mser_dist.shards.inspect import NO_LABEL, UNKNOWN, WIDTH, describe, draw, report_parts
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DatasetWriter
from tests.unit.made_up_set import meta, pcm

CLIP = st.fixed_dictionaries(
    {
        "split": st.sampled_from(["train", "val", "test", "extra"]),
        "label": st.sampled_from([None, "anger", "happy", "sad"]),
        "language": st.sampled_from(["de", "el", "fa"]),
        "speaker": st.sampled_from(["s1", "s2", "s3"]),
        "corpus": st.sampled_from(["one", "two"]),
        "gender": st.sampled_from([None, "female", "male"]),
        "synthetic": st.booleans(),
        "sample_rate": st.sampled_from([16000, 44100]),
        "source_id": st.sampled_from(["u1", "u2", "u3"]),
        "duration": st.floats(0.1, 30),
    }
)


def told(report: dict[str, Any]) -> str:
    """As it is piped."""
    return "\n\n".join(map(str, report_parts(report)))


def write(out: Path, clips: list[dict[str, Any]]) -> Path:
    """A set of these clips; its audio cannot be decoded, for nothing may read it."""
    with DatasetWriter(out, "set", {}, shard_samples=4) as writer:
        for i, clip in enumerate(clips):
            info = meta(0, emotion=f"{clip.get('label')}-ish") | clip
            writer.write(info.pop("split", "train"), f"{out.name}-{i}", b"no audio", "flac", info)
    return out


def plainly(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """What `describe` is to say of some clips, counted one by one."""
    length = np.array([clip["duration"] for clip in clips], dtype=np.float32)
    quantiles = dict(zip(("min", "median", "p95", "max"), np.percentile(length, (0, 50, 95, 100)), strict=True))
    return {
        "clips": len(clips),
        "hours": pytest.approx(length.sum() / 3600, abs=1e-4),
        "speakers": len({(clip["corpus"], clip["speaker"]) for clip in clips}),
        "seconds": {name: pytest.approx(v, abs=1e-3) for name, v in (quantiles | {"mean": length.mean()}).items()},
        "labels": Counter(clip["label"] or NO_LABEL for clip in clips),
    }


@settings(max_examples=40, deadline=None)
@given(clips=st.lists(CLIP, min_size=1, max_size=30))
def test_the_numbers_are_those_of_counting(clips: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = describe(ShardSet.open(write(Path(folder) / "set", clips)))

    def groups(field: str) -> dict[str, Any]:
        result: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for clip in clips:
            result[clip[field]].append(clip)
        return {name: plainly(own) for name, own in result.items()}

    def without_zeros(group: dict[str, Any]) -> dict[str, Any]:
        return group | {"labels": {label: n for label, n in group["labels"].items() if n}}

    assert without_zeros(report["all"]) == plainly(clips)
    for key, field in (("splits", "split"), ("languages", "language"), ("corpora", "corpus")):
        assert {name: without_zeros(group) for name, group in report[key].items()} == groups(field)
    assert list(report["splits"]) == [name for name in ("train", "val", "test", "extra") if name in report["splits"]]
    assert report["genders"] == Counter(clip["gender"] or UNKNOWN for clip in clips)
    assert report["sample_rates"] == Counter(str(clip["sample_rate"]) for clip in clips)
    assert report["kinds"] == Counter("synthetic" if clip["synthetic"] else "recorded" for clip in clips)
    assert report["unlabelled"] == Counter("None-ish" for clip in clips if clip["label"] is None)

    utterances: dict[Any, list[str]] = defaultdict(list)
    splits: dict[Any, Counter[str]] = defaultdict(Counter)
    for clip in clips:
        utterances[clip["corpus"], clip["source_id"]].append(clip["language"])
        splits[clip["corpus"], clip["speaker"]][clip["split"]] += 1
    parallel = [spoken for spoken in utterances.values() if len(set(spoken)) > 1]
    assert report["parallel"] == {"utterances": len(parallel), "clips": sum(map(len, parallel))}
    shared = {(one["corpus"], one["speaker"]): one["clips"] for one in report["shared_speakers"]}
    assert shared == {voice: where for voice, where in splits.items() if len(where) > 1}
    assert (len(shared), report["speakerless"]) == (len(report["shared_speakers"]), 0)
    assert json.loads(json.dumps(report)) == report


def test_the_table(tmp_path: Path) -> None:
    clips = [{"split": "train", "label": "sad", "duration": 1.0, "corpus": "c", "language": "de"}] * 1234
    clips += [{"split": "test", "label": "happy", "duration": 3.0, "corpus": "c", "language": "el"}]
    report = told(describe(ShardSet.open(write(tmp_path / "set", clips))))
    assert report.split("\n\n")[0].splitlines() == [
        "split  clips  hours  speakers  min s  median  mean   p95  max s",
        "───────────────────────────────────────────────────────────────",
        "train  1,234   0.34         1   1.00    1.00  1.00  1.00   1.00",
        "test       1   0.00         1   3.00    3.00  3.00  3.00   3.00",
        "all    1,235   0.34         1   1.00    1.00  1.00  1.00   3.00",
    ]
    assert report.endswith("warning: speakers in more than one split: 1\n  s0 of c: train: 1,234, test: 1")


def test_a_wide_table_is_folded(tmp_path: Path) -> None:
    clips = [{"label": f"emotion-number-{i % n:02d}", "language": "de"} for n in range(1, 31) for i in range(n)]
    report = told(describe(ShardSet.open(write(tmp_path / "set", clips))))
    assert max(map(len, report.splitlines())) <= WIDTH
    names = [{"language": "de", "corpus": "a-corpus-with-a-name-" + "long-" * 30, "label": "sad"}]
    assert names[0]["corpus"] in told(describe(ShardSet.open(write(tmp_path / "named", names)))), "no name is cut"
    (head,) = [line for line in report.splitlines() if line.startswith("split") and "emotion" in line]
    assert head.split()[1] == "emotion-number-00" and head.endswith("others"), "the rarest are folded"
    folded = int(head.split()[-2])
    assert len(head.split()) == 1 + (30 - folded) + 2
    row = report.splitlines()[report.splitlines().index(head) + 2]
    assert sum(int(cell.replace(",", "")) for cell in row.split()[1:]) == len(clips)


def test_tars_that_say_nothing_of_their_clips(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set/a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(3):
            (tmp_path / "clip.wav").write_bytes(audio.encode(pcm(i), 16000, "wav"))
            tar.add(tmp_path / "clip.wav", f"{i}.wav")
    report = describe(ShardSet.open(tmp_path / "set"))
    assert (report["all"]["clips"], report["all"]["speakers"], report["speakerless"]) == (3, 0, 3)
    assert (report["all"]["labels"], report["unlabelled"]) == ({NO_LABEL: 3}, {UNKNOWN: 3})
    assert report["sample_rates"] == report["genders"] == {UNKNOWN: 3}
    assert list(report["splits"]) == [UNKNOWN]
    assert "warning: clips that name no speaker: 3" in told(report)
    draw(ShardSet.open(tmp_path / "set"), tmp_path / "plots")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [str(write(tmp_path / split, [{"split": split}] * 3)) for split in ("train", "test")]
    assert cli.main(["inspect", *sets]) == 0
    assert capsys.readouterr().out.endswith("\n  s0 of made-up: test: 3, train: 3\n")
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("train", "test")] == []
    out, numbers = tmp_path / "plots", tmp_path / "numbers.json"
    assert cli.main(["inspect", *sets, "--split", "test", "--out", str(out), "--json", str(numbers)]) == 0
    assert json.loads(numbers.read_text())["all"]["clips"] == 3
    names = {"durations", "labels", "languages", "sample_rates", "speakers"}
    assert {path.name for path in out.iterdir()} == {f"{name}.png" for name in names}
    capsys.readouterr()
    assert cli.main(["inspect", sets[0], "--split", "test"]) == 2
    assert "no sample is left" in capsys.readouterr().err
