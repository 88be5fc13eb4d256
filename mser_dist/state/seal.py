"""The seal of a checkpoint: the size and SHA-256 of every file, and what makes a folder unfit to be trusted."""

import json
import os
import stat
from pathlib import Path

from mser_dist.files import file_sha256

Sealed = dict[str, tuple[int, str]]  # file name → (bytes, SHA-256)


def read_seal(folder: Path) -> tuple[Sealed, str | None]:
    """(what a checkpoint's seal says, what is wrong with the seal itself)."""
    try:
        plain = json.loads((folder / "seal.json").read_text(encoding="utf-8"))
        return {str(name): (int(size), str(digest)) for name, (size, digest) in plain.items()}, None
    except (OSError, ValueError, TypeError, AttributeError):
        return {}, f"{folder.name} has no readable seal.json"


def seal_fault(folder: Path, sealed: Sealed, rank: int = 0, ranks: int = 1) -> str | None:
    """The first fault in one of `ranks` shares of a checkpoint's files, or None. A file not in the seal is one."""
    try:
        return _fault(folder, sealed, sorted(sealed)[rank::ranks])
    except OSError as error:  # on one rank alone, perhaps: its peers wait for an answer
        return f"{folder.name} cannot be read ({error.strerror})"


def _fault(folder: Path, sealed: Sealed, share: list[str]) -> str | None:
    strangers = sorted({path.name for path in folder.iterdir()} - sealed.keys() - {"seal.json"})
    if strangers:
        return f"{folder.name}/{strangers[0]} is not in the seal"
    for name in share:
        path, (size, digest) = folder / name, sealed[name]
        if not path.is_file():
            return f"{folder.name}/{name} is missing"
        if path.stat().st_size != size or file_sha256(path) != digest:
            return f"{folder.name}/{name} differs from its seal"
    return None


def folder_fault(folder: Path) -> str | None:
    """Why someone else could have written a folder, or something in it, or None. Folders in it are not entered."""
    for path in (folder, *sorted(folder.iterdir())):
        if not path.exists():  # a link to nothing: the seal's to judge
            continue
        found = path.stat()
        if found.st_uid != os.geteuid():
            return f"{path} belongs to user {found.st_uid}, not to you ({os.geteuid()})"
        if found.st_mode & stat.S_IWOTH:
            return f"{path} may be written to by everyone (mode {stat.S_IMODE(found.st_mode):04o})"
    return None
