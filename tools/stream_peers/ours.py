"""This project's shards, read through their index."""

from collections.abc import Callable, Iterator
from pathlib import Path

from mser_dist import audio
from mser_dist.shards.shard_set import ShardSet
from tools.stream_peers.common import Wave


def opened(folder: Path) -> Callable[[], Iterator[tuple[str, Wave]]]:
    shards = ShardSet.open(folder)

    def clips() -> Iterator[tuple[str, Wave]]:
        for i in range(len(shards)):
            sample = shards.read(i)
            yield sample.key, audio.decode(sample.audio, where=sample.where)

    return clips
