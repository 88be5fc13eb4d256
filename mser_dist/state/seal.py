"""The seal of a checkpoint: the size and SHA-256 of every file, and what makes a folder unfit to be trusted."""

import json
import os
import re
import stat
import time
from pathlib import Path

from mser_dist.files import file_sha256, shows
from mser_dist.ranks import distributed

LATE = 10.0  # seconds that a network disk may take to show what is there

Sealed = dict[str, tuple[int, str]]  # file name → (bytes, SHA-256)


def whole_fault(folder: Path, rank: int, ranks: int) -> str | None:
    """What is wrong with a checkpoint, or None, on every rank. Collective.

    Hashing a large one takes minutes on one node: each rank hashes its share of the files, and hears of these alone.
    """
    sealed, fault = read_seal(folder) if rank == 0 else ({}, None)
    fault = fault or (stranger_fault(folder, sealed) if rank == 0 else None)
    if fault := distributed.agree(fault):
        return fault
    share: Sealed = distributed.store().from_main(shares(sealed, ranks) if rank == 0 else None)
    return distributed.first(share_fault(folder, share))


def shares(sealed: Sealed, ranks: int) -> list[Sealed]:
    """Each rank's share of the files: those of its number, which it reads next, where as many ranks wrote them."""
    numbered = sorted((name for name in sealed if _number(name) >= 0), key=lambda name: (_number(name), name))
    found = [numbered[len(numbered) * rank // ranks : len(numbered) * (rank + 1) // ranks] for rank in range(ranks)]
    found[-1] += sorted(sealed.keys() - set(numbered))  # rank 0 has read the seal, and will read these
    return [{name: sealed[name] for name in names} for names in found]


def _number(name: str) -> int:
    found = re.fullmatch(r"\D*(\d+)\D*", name)
    return int(found[1]) if found else -1


def read_seal(folder: Path) -> tuple[Sealed, str | None]:
    """(what a checkpoint's seal says, what is wrong with the seal itself)."""
    try:
        shows(folder / "seal.json", LATE)
        plain = json.loads((folder / "seal.json").read_text(encoding="utf-8"))
        return {str(name): (int(size), str(digest)) for name, (size, digest) in plain.items()}, None
    except (OSError, ValueError, TypeError, AttributeError):
        return {}, f"{folder.name} has no readable seal.json"


def seal_fault(folder: Path, sealed: Sealed) -> str | None:
    """The first fault in a checkpoint's files, or None. A file not in the seal is one."""
    return stranger_fault(folder, sealed) or share_fault(folder, sealed)


def stranger_fault(folder: Path, sealed: Sealed) -> str | None:
    """What is in a checkpoint's folder and not in its seal, or None."""
    try:
        strangers = sorted({path.name for path in folder.iterdir()} - sealed.keys() - {"seal.json"})
    except OSError as error:
        return f"{folder.name} cannot be read ({error.strerror})"
    return f"{folder.name}/{strangers[0]} is not in the seal" if strangers else None


def share_fault(folder: Path, share: Sealed) -> str | None:
    """The first fault in some of a checkpoint's files, or None."""
    deadline = time.monotonic() + LATE
    try:
        for name, (size, digest) in share.items():
            path = folder / name
            if not shows(path, deadline - time.monotonic(), size) and not path.is_file():
                return f"{folder.name}/{name} is missing"
            if path.stat().st_size != size or file_sha256(path) != digest:
                return f"{folder.name}/{name} differs from its seal"
    except OSError as error:  # on one rank alone, perhaps: its peers wait for an answer
        return f"{folder.name} cannot be read ({error.strerror})"
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
