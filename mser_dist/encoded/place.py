"""Where features are kept: on a disk, found by what they depend on, or in the memory of each node."""

import atexit
import os
import secrets
import shutil
import socket
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray

from mser_dist.config.model_keys import CacheConfig
from mser_dist.encoded.store import folder_of, make_room
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.ranks import distributed
from mser_dist.stream.examples import Examples

FRAME = 0.02  # seconds: of Whisper's and of the wav2vec family's encoders
RAM = Path("/dev/shm")
IN_RAM = "mser-features-"


def address_of(frozen: FrozenEncoder, clips: Examples) -> dict[str, Any]:
    """What features depend on beside the samples of a clip; JSON."""
    changed: dict[str, Any] = {}
    if clips.augment:  # each variant has a key of its own, however many there are
        changed["augment"] = {name: value for name, value in asdict(clips.augment).items() if name != "variants"}
        changed["max_seconds"] = clips.max_seconds  # where a slowed clip is cut
    return {
        "version": 1,
        "encoder": frozen.sha256(),
        **frozen.encoder.settings(),
        "dtype": str(frozen.dtype).removeprefix("torch."),
        **changed,
    }


def bytes_of(clips: Examples, frozen: FrozenEncoder, index: NDArray[np.int64]) -> int:
    """About so many bytes the features of these clips take, a variant."""
    encoder = frozen.encoder
    frames = np.ceil(clips.shards.duration[index] / (FRAME * encoder.stride)) + 1
    return int(frames.sum()) * len(encoder.layers) * encoder.width * frozen.dtype.itemsize + 28 * len(index)


class Node(NamedTuple):
    """The ranks that fill a folder together."""

    rank: int  # of this process, among them
    size: int
    all_ranks: bool  # they are all of the job's


def default_folder() -> Path:
    """MSER_FEATURES, else ~/.cache/mser_dist/features."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MSER_FEATURES") or base / "mser_dist" / "features")


def disk_folder(cache: CacheConfig) -> Path:
    """Where cache=disk keeps features, of all encoders."""
    return Path(cache.cache_dir).expanduser() if cache.cache_dir else default_folder()


def choose(
    cache: CacheConfig, address: dict[str, Any], need: int, world: distributed.World
) -> tuple[Path | None, Node, str]:
    """The folder of all features, who fills it, and why it is None. Collective."""
    everyone = Node(world.rank, world.world_size, True)
    if cache.cache == "memory":
        hosts = distributed.gather(socket.gethostname())
        mine = [rank for rank, host in enumerate(hosts) if host == socket.gethostname()]
        node = Node(mine.index(world.rank), len(mine), len(mine) == world.world_size)
        names = distributed.gather(f"{IN_RAM}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
        root = RAM / names[mine[0]]
        problem = _ram_problem(root, need) if node.rank == 0 else None
        problem = next((found for found in distributed.gather(problem) if found), None)
        return (None if problem else root), node, problem or ""
    root = disk_folder(cache)
    problem = _disk_problem(root, cache, address, need) if world.is_main else None
    problem = distributed.agree(problem)
    return (None if problem else root), everyone, problem or ""


def _ram_problem(root: Path, need: int) -> str | None:
    """Make a folder in memory that goes with this process, or say why not. Those of dead processes are removed."""
    for old in RAM.glob(f"{IN_RAM}{socket.gethostname()}-*-*"):  # another host: a container with pids of its own
        with suppress(OSError, ValueError):
            if old.stat().st_uid == os.getuid() and not psutil.pid_exists(int(old.name.split("-")[-2])):
                shutil.rmtree(old)
    try:
        root.mkdir(mode=0o700)
        free = shutil.disk_usage(RAM).free
    except OSError as error:
        return f"encoder.cache=memory: {RAM} cannot be written ({error.strerror}): set encoder.cache=disk"
    if need > free:
        root.rmdir()
        return (
            f"encoder.cache=memory: the features take {need / 1e9:.2f} GB, and {RAM} has {free / 1e9:.2f} GB free: set "
            "encoder.cache=disk, or a larger encoder.stride"
        )
    if not _own:
        atexit.register(give_back)
    _own.append((root, os.getpid()))
    return None


_own: list[tuple[Path, int]] = []  # folders in memory, and who made them: a forked worker is not the one to remove them


def give_back() -> None:
    """Remove this process' folders in memory: at its end, and by whoever ends it without Python's own end."""
    for root, pid in _own:
        if os.getpid() == pid:
            shutil.rmtree(root, ignore_errors=True)


def _disk_problem(root: Path, cache: CacheConfig, address: dict[str, Any], need: int) -> str | None:
    """Make room for features on the disk, or say why there is none."""
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        own = folder_of(root, address)
        room = make_room(root, need, round(cache.cache_gb * 1e9), own)
        there = sum(path.stat().st_size for path in own.glob("*.features"))
        free = shutil.disk_usage(root).free
    except OSError as error:
        return f"{root} cannot be used ({error.strerror}): name another folder with encoder.cache_dir"
    wish = f"the features take {need / 1e9:.2f} GB"
    remedy = "a larger encoder.stride makes them smaller, and encoder.cache=off keeps none"
    if need > room + there:
        return f"{wish}, and encoder.cache_gb={cache.cache_gb:g} leaves {(room + there) / 1e9:.2f}: raise it; {remedy}"
    if need > free + there:
        return f"{wish}, and {root} has {free / 1e9:.2f} GB free: name another disk with encoder.cache_dir; {remedy}"
    return None
