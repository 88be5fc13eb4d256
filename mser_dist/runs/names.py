"""Names of metrics and parameters, as log.jsonl and MLflow have them: what MLflow takes and its plots can read."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

Name = str | tuple[str, ...]
"""A name, or its parts between "/": a part of data may hold one itself."""

LENGTH = 250  # characters; MLflow refuses longer ones
# MLflow takes letters of any script, digits and _ - . / : and the space; but its box plots cut a name at the first "-".
_ODD = re.compile(r"[^\w./: ]")


def plain(names: Iterable[Name]) -> list[str]:
    """The names with "_" for every character that may not stand there; no two are equal, nor differ by case alone.

    Where two would be, each gets a hash of what it was (some of MLflow's databases compare without case). A name that
    this returns, it returns again unchanged.
    """
    names = list(names)
    shown = [_plain(name) for name in names]
    count = Counter(map(_key, shown))
    return [
        one if count[_key(one)] == 1 else f"{one[: LENGTH - 9]}_{_hash(name)}"
        for one, name in zip(shown, names, strict=True)
    ]


def _plain(name: Name) -> str:
    parts = name.split("/") if isinstance(name, str) else [part.replace("/", "_") for part in name]
    # MLflow keeps them as paths: no part may be empty, "." or "..".
    text = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    text = _ODD.sub("_", unicodedata.normalize("NFC", text))
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 9]}_{_hash(name)}"


def _key(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _hash(name: Name) -> str:
    return hashlib.blake2b(repr(name).encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
