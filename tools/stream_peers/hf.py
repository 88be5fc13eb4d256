"""Hugging Face datasets, streaming Parquet files that hold the audio files.

Soundfile decodes, for torchcodec, which `datasets` does it with, does not load beside every build of torch.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import datasets  # type: ignore[import-not-found, unused-ignore]

from tools.stream_peers.common import SHARD_CLIPS, Wave, decode


def write(files: list[Path], folder: Path) -> None:
    folder.mkdir()
    for start in range(0, len(files), SHARD_CLIPS):
        rows = [{"key": file.stem, "audio": file.read_bytes()} for file in files[start : start + SHARD_CLIPS]]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"train-{start:06d}.parquet")


def opened(folder: Path) -> Callable[[], Iterator[tuple[str, Wave]]]:
    shards = [str(shard) for shard in sorted(folder.glob("*.parquet"))]
    stream = datasets.load_dataset("parquet", data_files=shards, split="train", streaming=True)

    def clips() -> Iterator[tuple[str, Wave]]:
        for row in stream:
            yield row["key"], decode(row["audio"])

    return clips
