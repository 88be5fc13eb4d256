"""mosaicml-streaming: MDS shards that hold the audio files, read in their order."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.stream_peers.common import SHARD_CLIPS, Wave, decode

# `streaming/__init__.py` imports its vision data sets, and with them torchvision, whose wheel does not load beside
# every build of torch. The package is entered without running that file: `streaming.base` is all that is used.
_spec = importlib.util.find_spec("streaming")
assert _spec, "mosaicml-streaming is not installed"
sys.modules["streaming"] = importlib.util.module_from_spec(_spec)

from streaming.base import MDSWriter, StreamingDataset  # type: ignore[import-not-found, unused-ignore]  # noqa: E402


def write(files: list[Path], folder: Path) -> None:
    largest = SHARD_CLIPS * max(file.stat().st_size for file in files)
    with MDSWriter(out=str(folder), columns={"key": "str", "audio": "bytes"}, size_limit=largest) as writer:
        for file in files:
            writer.write({"key": file.stem, "audio": file.read_bytes()})


def opened(folder: Path) -> Callable[[], Iterator[tuple[str, Wave]]]:
    stream = StreamingDataset(local=str(folder), shuffle=False, batch_size=1)

    def clips() -> Iterator[tuple[str, Wave]]:
        for sample in stream:
            yield sample["key"], decode(sample["audio"])

    return clips
