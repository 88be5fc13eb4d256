"""Lhotse Shar: its own tar of audio beside a list of cuts, read and decoded by lhotse."""

from collections.abc import Callable, Iterator
from pathlib import Path

from lhotse import CutSet, MonoCut, Recording  # type: ignore[import-not-found, unused-ignore]

from tools.stream_peers.common import SHARD_CLIPS, Wave


def write(files: list[Path], folder: Path) -> None:
    """Lhotse encodes the samples again, with libsndfile as `audio.encode` does."""
    folder.mkdir()
    recordings = (Recording.from_file(file, recording_id=file.stem) for file in files)
    cuts = CutSet.from_cuts(MonoCut(r.id, start=0, duration=r.duration, channel=0, recording=r) for r in recordings)
    cuts.to_shar(folder, fields={"recording": files[0].suffix[1:]}, shard_size=SHARD_CLIPS)


def opened(folder: Path) -> Callable[[], Iterator[tuple[str, Wave]]]:
    cuts = CutSet.from_shar(in_dir=folder)

    def clips() -> Iterator[tuple[str, Wave]]:
        for cut in cuts:
            yield cut.id, cut.load_audio()[0]

    return clips
