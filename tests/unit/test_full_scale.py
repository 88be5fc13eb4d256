"""Samples beyond full scale: refused, divided where the user says so, never clipped unseen."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from mser_dist import audio
from mser_dist.cli import main as cli
from mser_dist.corpora.pack import pack
from mser_dist.errors import UserError
from mser_dist.shards.inspect import describe, full_scale
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.verify import verify
from mser_dist.stream.dataset import open_set

FLOATS = [
    (kind, subtype) for kind in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF") for subtype in ("FLOAT", "DOUBLE")
]


def file_of(wave: np.ndarray, rate: int = 16000, kind: str = "WAV", subtype: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


def noise(top: float, seed: int = 0, samples: int = 8000) -> np.ndarray:
    """Noise that reaches exactly ±top."""
    wave = np.random.default_rng(seed).standard_normal(samples)
    return wave * (top / np.abs(wave).max())


def manifest(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    rows = [f"{name},happy,en,s{i},train" for i, name in enumerate(files)]
    (folder / "clips.csv").write_text("\n".join(["path,emotion,language,speaker,split", *rows]), encoding="utf-8")
    return folder / "clips.csv"


@pytest.mark.parametrize(("kind", "subtype"), FLOATS)
@pytest.mark.parametrize("top", [1.001, 1.5, 9.0, 20000.0, 32768.0])
def test_floats_beyond_full_scale_are_refused(kind: str, subtype: str, top: float) -> None:
    with pytest.raises(audio.BeyondFullScaleError, match=r"^clip: its samples reach .* times full scale; .*--scale"):
        audio.decode(file_of(noise(top), kind=kind, subtype=subtype), "clip")


@pytest.mark.parametrize("top", [1.0, 32768 / 32767])
def test_full_scale_itself_is_not_beyond(top: float) -> None:
    assert audio.peak(audio.decode(file_of(noise(top)), "clip")) in (32768, 32769)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_scale_divides_by_the_peak_or_16_bit_integers_by_32768(rate: int, channels: int) -> None:
    def scaled(wave: np.ndarray) -> np.ndarray:
        return audio.decode(file_of(np.stack([wave] * channels, axis=1), rate), "clip", scale=True)

    quiet = np.convolve(noise(1.0), np.ones(64) / 64, "same")  # low enough that resampling leaves its peak
    quiet *= 0.25 / np.abs(quiet).max()
    expected = scaled(quiet)
    np.testing.assert_allclose(scaled(quiet * 32768), expected, atol=1e-6)
    for factor in (6.0, 100.0):  # 1.5 and 25 times full scale
        wave = scaled(quiet * factor)
        np.testing.assert_allclose(wave * np.abs(expected).max(), expected * np.abs(wave).max(), atol=1e-6)
        assert audio.peak(wave) == 32766
        assert np.abs(audio.to_pcm16(wave).astype(int)).max() == 32766
    np.testing.assert_array_equal(expected, audio.decode(file_of(np.stack([quiet] * channels, axis=1), rate), "clip"))
    assert audio.peak(scaled(noise(2.0) * 32768)) == 32766  # even integers of more than 16 bits are not clipped


def test_int16_scaled_floats_are_refused_by_pack_and_divided_by_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pcm = [np.rint(noise(3000.0 * (i + 1), i)).astype(np.int16) for i in range(3)]
    wavs = {f"{i}.wav": file_of(wave.astype(np.float32)) for i, wave in enumerate(pcm)}
    source, out = str(manifest(tmp_path / "src", wavs)), str(tmp_path / "set")
    assert cli.main(["pack", "manifest", source, out]) == 2
    said = capsys.readouterr().err
    assert "0.wav: its samples reach 3000 times full scale" in said and "--scale" in said
    assert not Path(out).exists()
    assert cli.main(["pack", "manifest", source, out, "--scale"]) == 0
    assert "clips beyond full scale, divided: 3" in capsys.readouterr().out
    shards = ShardSet.open(out, sound=True)
    for i, wave in enumerate(pcm):
        np.testing.assert_array_equal(audio.to_pcm16(audio.decode(shards.read(i).audio, "clip")), wave)
    assert json.loads((Path(out) / "dataset.json").read_text())["made_by"]["scale"] is True
    assert not verify(out)


def clipped_44k() -> bytes:
    """A hard-clipped recording, as many corpora have: resampled to 16 kHz, it goes over full scale."""
    return file_of(np.clip(noise(6.0, samples=44100), -1, 1), 44100, subtype="PCM_16")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_resampling_and_codecs_add_is_clipped_and_counted(workers: int, tmp_path: Path) -> None:
    square = np.clip(noise(6.0, samples=44100), -1, 1)
    over = {
        "resampled.wav": clipped_44k(),
        "mp3.mp3": file_of(square, 44100, "MP3", "MPEG_LAYER_III"),
        "ogg.ogg": file_of(square, 44100, "OGG", "VORBIS"),
    }
    within = {
        "touches.wav": file_of(np.clip(noise(6.0), -1, 1), subtype="PCM_16"),
        "quiet.wav": file_of(noise(0.5), subtype="PCM_16"),
    }
    source = manifest(tmp_path / "src", over | within)
    told = pack("manifest", source, tmp_path / "set", workers=workers, progress=False)
    tops = [audio.peak(audio.decode(data, name)) for name, data in over.items()]
    assert min(tops) > 32768
    most = round(20 * float(np.log10(max(tops) / 32768)), 2)
    assert told["full_scale"] == {"clips": 4, "beyond": 3, "decibels": most, "unknown": 0}
    assert told["scaled"] == 0
    assert not verify(tmp_path / "set")
    told = pack("manifest", source, tmp_path / "scaled", workers=workers, progress=False, scale=True)
    assert told["full_scale"] == {"clips": 1, "beyond": 0, "decibels": 0.0, "unknown": 0}
    assert told["scaled"] == 3


def test_a_codec_far_beyond_full_scale_is_refused() -> None:
    with pytest.raises(audio.BeyondFullScaleError):
        audio.decode(file_of(noise(6.0), kind="OGG", subtype="VORBIS"), "clip")


def test_inspect_counts_what_touches_full_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touches = np.array([0, 32767, -32768, 5], np.int16).repeat(500)
    files = {"up.wav": touches[:1000], "down.wav": touches[1000:], "below.wav": np.minimum(touches, 32766)[:1000]}
    source = manifest(tmp_path / "src", {name: audio.encode(pcm, 16000, "wav") for name, pcm in files.items()})
    pack("manifest", source, tmp_path / "set", progress=False)
    assert cli.main(["inspect", str(tmp_path / "set"), "--json", str(tmp_path / "set.json")]) == 0
    assert "full scale     touched by 2 clips\n" in capsys.readouterr().out
    told = json.loads((tmp_path / "set.json").read_text())["full_scale"]
    assert told == {"clips": 2, "beyond": 0, "decibels": 0.0, "unknown": 0}
    source.write_text(source.read_text() + "\nover.wav,happy,en,s9,train", encoding="utf-8")
    (tmp_path / "src/over.wav").write_bytes(clipped_44k())
    assert cli.main(["pack", "manifest", str(source), str(tmp_path / "more")]) == 0
    assert "overshot full scale, by up to" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "more")]) == 0
    assert "full scale     touched by 3 clips, 1 go beyond by up to" in capsys.readouterr().out


def test_an_older_index_does_not_know_and_verify_finds_a_wrong_peak(tmp_path: Path) -> None:
    source = manifest(tmp_path / "src", {"a.wav": clipped_44k(), "b.wav": file_of(noise(0.5), subtype="PCM_16")})
    pack("manifest", source, tmp_path / "set", progress=False)
    path = next((tmp_path / "set").glob("*.idx.json"))
    index = json.loads(path.read_text())
    index["columns"]["peak"][1] += 9
    path.write_text(json.dumps(index))
    assert any("differ in peak" in problem for problem in verify(tmp_path / "set"))
    del index["columns"]["peak"]
    path.write_text(json.dumps(index))
    assert full_scale(ShardSet.open(path.with_suffix("").with_suffix(""), sound=True))["unknown"] == 2
    assert describe(ShardSet.open(path.with_suffix("").with_suffix("")))["full_scale"] is None


def test_a_foreign_tar_is_told_of_by_verify_and_not_trained_on_beyond_full_scale(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for key, data in (("bad", file_of(noise(9000.0))), ("loud", file_of(noise(1.0), subtype="PCM_16"))):
            member = tarfile.TarInfo(f"{key}.wav")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    clips = open_set(tmp_path)
    with pytest.raises(UserError, match=r"sample bad: its samples reach 9000 times full scale"):
        clips[0]
    assert len(clips[1]["audio"]) == 8000
    assert full_scale(ShardSet.open(tmp_path, sound=True))["unknown"] == 2
    problems = verify(tmp_path)
    assert len(problems) == 1 and "times full scale" in problems[0]
    assert full_scale(ShardSet.open(tmp_path, sound=True)) | {"decibels": 0} == {
        "clips": 1, "beyond": 0, "decibels": 0, "unknown": 1,
    }  # fmt: skip


def test_resampling_within_full_scale_is_what_soxr_gives() -> None:
    wave = noise(0.5).astype(np.float32)
    expected = soxr.resample(wave, 44100, 16000, quality="HQ")
    np.testing.assert_array_equal(audio.decode(file_of(wave, 44100), "clip"), expected)
