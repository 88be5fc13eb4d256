"""The recordings that a user names: files, folders of files, shards. Each is read when it is asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mser_dist import audio
from mser_dist.errors import UserError
from mser_dist.models.normalize import corpora_of
from mser_dist.shards.remote import is_remote
from mser_dist.shards.shard_set import ShardSet

NAMES = frozenset(
    f".{ending}"
    for ending in (
        *("aac", "aif", "aifc", "aiff", "amr", "au", "caf", "flac", "m4a", "mp2", "mp3", "mp4", "oga", "ogg", "opus"),
        *("rf64", "snd", "sph", "voc", "w64", "wav", "webm", "wma", "wv"),
    )
)
"""Ends of the names of files that are taken from a folder. Not all can be read: those that cannot are left out, and
named, where a file that was passed over in silence would be missed by nobody. A file that is named itself is taken
whatever its name is; its content decides."""
LONGEST = 6 * 3600.0  # seconds of a recording; an hour takes 230 MB


@dataclass(frozen=True)
class Recording:
    """A file, or a clip of a set of shards."""

    name: str  # its path; of a clip the shard's, then its key
    place: tuple[ShardSet, int] | Path
    corpus: str = ""  # as `models.normalize.corpora_of` names it, of a clip

    def read(self, longest: float = LONGEST) -> np.ndarray:
        """float32 [samples] at 16 kHz. Raises `UserError`, without the name, for what cannot be read or is no audio."""
        if isinstance(self.place, Path):
            try:
                data = self.place.read_bytes()
            except OSError as error:
                raise UserError(f"cannot be read ({error.strerror})") from None
        else:
            shards, number = self.place
            data, _ = shards.reader.read(shards.refs([number])[0])
        return decode(data, longest)

    @property
    def size(self) -> int:
        """Bytes; 0 where it is not there. Tells a recording from one of the same name that took its place."""
        if isinstance(self.place, Path):
            return self.place.stat().st_size if self.place.is_file() else 0
        shards, number = self.place
        return shards.refs([number])[0].audio_size


def decode(data: bytes, longest: float = LONGEST, max_rate: int = audio.MAX_RATE) -> np.ndarray:
    """float32 [samples] at 16 kHz of an audio file, divided if beyond full scale. Raises `UserError` without a name.

    max_rate: samples of all channels in a second, as of `audio.decode`.
    """
    try:
        found = audio.seconds(data, "")
        if found > longest:
            raise UserError(f": {found:.1f} s of audio, the limit is {longest:g} s; cut it")
        return audio.decode(data, "", max_seconds=longest, scale=True, max_rate=max_rate)
    except UserError as error:
        raise UserError(str(error).removeprefix(": ").partition(";")[0]) from None


def listed(paths: Sequence[str], split: str | None = None) -> list[Recording]:
    """The recordings of files, folders and sets of shards (folders, tars, URLs), each once, in the order given.

    Of a folder that is no set, the files below it that have the name of an audio file, by name. split: of sets alone.
    Raises `UserError` for what is not there, and for a folder without any.
    """
    found: dict[str, Recording] = {}
    for path in paths:
        for recording in _under(path, split):
            found.setdefault(recording.name, recording)
    return list(found.values())


def _under(path: str, split: str | None) -> Iterator[Recording]:
    here = Path(path).expanduser()
    if is_remote(path) or (here.is_file() and here.suffix == ".tar") or _is_set(here):
        shards = ShardSet.open([path if is_remote(path) else here], split=split)
        for i, corpus in enumerate(corpora_of(shards)):
            yield Recording(f"{shards.shards[shards.shard[i]].name}/{shards.key(i)}", (shards, i), corpus)
    elif here.is_dir():
        files = sorted(file for file in here.rglob("*") if file.suffix.lower() in NAMES and file.is_file())
        if not files:
            raise UserError(f"{path}: no file in this folder has the name of an audio file, and it is no set of shards")
        yield from (Recording(str(file), file) for file in files)
    elif here.exists():
        yield Recording(str(here), here)
    else:
        raise UserError(f"{path}: there is no such file or folder")


def _is_set(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "dataset.json").is_file() or any(folder.glob("*.tar")))


def as_wave(sound: Any, sampling_rate: int | None) -> np.ndarray:
    """float32 [samples] at 16 kHz of an array or tensor: [samples], or with an axis of channels, which are averaged.

    Signed integers are taken as full scale of their type. Raises `UserError` for what is no waveform.
    """
    import soxr

    if sampling_rate is None or sampling_rate <= 0:
        raise UserError("an array of samples needs its rate: give sampling_rate= in Hz, e.g. sampling_rate=16000")
    wave = np.asarray(sound.detach().cpu() if hasattr(sound, "detach") else sound)
    if np.issubdtype(wave.dtype, np.signedinteger):
        wave = wave.astype(np.float32) / -float(np.iinfo(wave.dtype).min)
    if wave.ndim == 2 and min(wave.shape) <= audio.MAX_CHANNELS:
        wave = wave.mean(axis=int(np.argmin(wave.shape)))
    if wave.ndim != 1 or not wave.size or not np.issubdtype(wave.dtype, np.floating):
        raise UserError(f"an array of shape {list(wave.shape)} and type {wave.dtype} is no waveform: give [samples]")
    if not np.isfinite(wave).all():
        raise UserError("an array of samples holds NaN or infinite ones")
    wave = wave.astype(np.float32)
    if sampling_rate != audio.SAMPLE_RATE:
        wave = soxr.resample(wave, sampling_rate, audio.SAMPLE_RATE, quality="HQ")
    top = float(np.abs(wave).max(initial=0.0))
    return np.ascontiguousarray(wave / max(1.0, top), dtype=np.float32)
