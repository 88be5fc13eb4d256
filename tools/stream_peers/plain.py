"""Plain files: one audio file a clip in one folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

import soundfile

from tools.stream_peers.common import Wave


def opened(folder: Path) -> Callable[[], Iterator[tuple[str, Wave]]]:
    files = sorted(folder.iterdir())

    def clips() -> Iterator[tuple[str, Wave]]:
        for file in files:
            yield file.stem, soundfile.read(file, dtype="float32")[0]

    return clips
