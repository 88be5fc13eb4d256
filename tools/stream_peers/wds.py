"""WebDataset over our own shards, in their order, with soundfile; the json is read and not parsed, as in ours."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import webdataset

from tools.stream_peers.common import Wave, decode


def opened(folder: Path) -> Callable[[], Iterator[tuple[str, Wave]]]:
    def clip(sample: dict[str, Any]) -> tuple[str, Wave]:
        return sample["__key__"], decode(sample["wav"] if "wav" in sample else sample["flac"])

    shards = [str(shard) for shard in sorted(folder.glob("*.tar"))]
    return webdataset.WebDataset(shards, shardshuffle=False).map(clip).__iter__
