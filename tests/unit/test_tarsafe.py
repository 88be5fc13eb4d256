import io
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mser_dist import audio
from mser_dist.errors import UserError
from mser_dist.shards import tarsafe
from mser_dist.shards.shard_set import ShardSet
from tests.unit.made_up_set import pcm


def tar_of(path: Path, change: Callable[[tarfile.TarInfo], None], data: bytes | None = None, **options: Any) -> Path:
    """A tar with a good member, then one changed by `change`, then another good one."""
    good = audio.encode(pcm(0), 16000, "wav")
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for name in ("a.wav", "b.wav", "c.wav"):
            info = tarfile.TarInfo(name)
            content = good
            if name == "b.wav":
                content = good if data is None else data
                change(info)
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))
    return path


def set_to(**values: Any) -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        for name, value in values.items():
            setattr(info, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_to(name="../../b.wav"), "unsafe member name"),
        (set_to(name="x/../../b.wav"), "unsafe member name"),
        (set_to(name="/etc/b.wav"), "unsafe member name"),
        (set_to(name="b\nx.wav"), "unsafe member name"),
        (set_to(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "link"),
        (set_to(type=tarfile.LNKTYPE, linkname="a.wav"), "link"),
        (set_to(name="../../b", type=tarfile.DIRTYPE), "unsafe member name"),
        (set_to(name="/etc/b", type=tarfile.DIRTYPE), "unsafe member name"),
        (set_to(type=tarfile.CHRTYPE), "device"),
        (set_to(type=tarfile.FIFOTYPE), "device"),
        (set_to(type=tarfile.GNUTYPE_SPARSE), "sparse"),
        (set_to(pax_headers={"GNU.sparse.realsize": "400000000"}), "sparse"),
        (set_to(pax_headers={"comment": "x" * (1 << 20)}), "extended header of"),
        (set_to(name="b.pyd"), "neither audio"),
        (set_to(name="b.pickle"), "neither audio"),
        (set_to(name="a.wav"), "two audio members"),
        (set_to(name="b.json"), "no audio|json cannot be read"),
    ],
)
def test_unsafe_members_are_refused(tmp_path: Path, change: Callable[[tarfile.TarInfo], None], says: str) -> None:
    tar = tar_of(tmp_path / "x.tar", change, format=tarfile.PAX_FORMAT)
    with pytest.raises(UserError, match=says) as caught:
        ShardSet.open(tar)
    assert str(tar) in str(caught.value)
    assert not list(tmp_path.glob("*.idx.json"))


@pytest.mark.parametrize("headers", [{"path": "b.wav"}, {"size": "5"}])
def test_a_global_header_renames_no_member(tmp_path: Path, headers: dict[str, str]) -> None:
    """tarfile, and so webdataset, would give that name to every member."""
    tar = tar_of(tmp_path / "x.tar", set_to(), format=tarfile.PAX_FORMAT, pax_headers=headers)
    with pytest.raises(UserError, match="a global extended header that names a path or a size"):
        ShardSet.open(tar)
    tar_of(tmp_path / "x.tar", set_to(), format=tarfile.PAX_FORMAT, pax_headers={"comment": "fine"})
    assert ShardSet.open(tmp_path / "x.tar").keys == ["a", "b", "c"]


def test_interleaved_keys_are_refused(tmp_path: Path) -> None:
    sound = audio.encode(pcm(1), 16000, "wav")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.wav", "b.wav", "a.txt"):
            info = tarfile.TarInfo(name)
            info.size = len(sound)
            tar.addfile(info, io.BytesIO(sound))
    with pytest.raises(UserError, match=r"x\.tar: the members of the key 'a' are not side by side"):
        ShardSet.open(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("mode", "change", "says"),
    [
        ("w:gz", set_to(), "compressed"),
        ("w:xz", set_to(), "compressed"),
        ("w:bz2", set_to(), "compressed"),
        ("w", set_to(type=tarfile.GNUTYPE_SPARSE), "sparse"),
        ("w", set_to(pax_headers={"comment": "x" * 50_000_000}), "extended header of"),
    ],
)
def test_what_unpacks_to_much_is_refused_in_little_memory(
    tmp_path: Path, mode: str, change: Callable[[tarfile.TarInfo], None], says: str
) -> None:
    tar = tar_of(tmp_path / "x.tar", change, bytes(20_000_000), mode=mode, format=tarfile.PAX_FORMAT)
    tracemalloc.start()
    with pytest.raises(UserError, match=says):
        ShardSet.open(tar)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_size_beyond_the_file_is_not_read(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    tar.write_bytes(tarsafe.header("a.wav", 1 << 30) + bytes(512) + tarsafe.END)
    with pytest.raises(UserError, match=r"cut inside member 'a\.wav'"):
        ShardSet.open(tar)
