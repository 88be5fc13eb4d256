import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mser_dist.data import audio, tarsafe
from mser_dist.data.shards import ShardSet
from mser_dist.errors import UserError
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


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_compressed_tars_are_refused(tmp_path: Path, mode: str) -> None:
    tar = tar_of(tmp_path / "x.tar", set_to(), bytes(10_000_000), mode=mode)
    with pytest.raises(UserError, match="compressed"):
        ShardSet.open(tar)


def test_a_size_beyond_the_file_is_not_read(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    tar.write_bytes(tarsafe.header("a.wav", 1 << 30) + bytes(512) + tarsafe.END)
    with pytest.raises(UserError, match=r"cut inside member 'a\.wav'"):
        ShardSet.open(tar)
