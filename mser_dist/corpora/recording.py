"""A recording of a corpus before it is packed, as every parser yields it."""

import errno
import hashlib
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording of a corpus and what is known of it."""

    path: Path
    emotion: str  # the corpus's own word
    label: str | None  # the class (`emotions.to_label`); None where annotators named no emotion
    language: str  # ISO 639-1
    speaker: str
    corpus: str
    id: str  # unique in the corpus, fit for a shard's key
    source_id: str  # the utterance it speaks or translates; links parallel clips
    gender: str | None = None  # "female", "male" or not known
    text: str | None = None
    split: str | None = None  # "train", "val" or "test" where the source prescribes it


def why_no_file(path: Path) -> str | None:
    """None for a file that is there; else the path, cut where it is long, and what is there instead."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
        what = f"{'is missing' if missing else 'cannot be read'} ({str(error.strerror).lower()})"
    except UnicodeEncodeError:
        what = f"has no name in this machine's encoding ({sys.getfilesystemencoding()}; PYTHONUTF8=1 makes it UTF-8)"
    except ValueError:
        what = "is missing (it holds a NUL byte)"
    else:
        if stat.S_ISREG(mode):
            return None
        what = "is a folder, not a file" if stat.S_ISDIR(mode) else "is no regular file"
    name = str(path) if str(path).isprintable() else repr(str(path))
    return f"{name if len(name) <= 250 else name[:80] + '…' + name[-40:]} {what}"


def safe_id(name: str) -> str:
    """An identifier of at most 74 of the characters A-Z a-z 0-9 _ -; a name that had to be changed gets a hash of it
    appended.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name.replace("/", "_"))
    if safe != name.replace("/", "_") or len(safe) > 74:
        safe = f"{safe[:65]}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    return safe
