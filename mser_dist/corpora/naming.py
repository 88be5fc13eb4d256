"""Corpora whose file names carry the labels: a row of a table each (`Naming`), and one walk that reads them all."""

import filecmp
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mser_dist.corpora.recording import Recording, safe_id
from mser_dist.errors import UserError
from mser_dist.shards.emotions import to_label


@dataclass(frozen=True, kw_only=True, slots=True)
class Naming:
    """How a corpus names its files.

    pattern: matches the end of a file's path without its ending; a group `emotion`, a group `speaker`, and perhaps
    `gender` and `text`. What it matches is the clip's id, so that it takes in a folder where names repeat between
    folders. layout: the same in words, for help and errors. clips: how many the publisher says there are, without those
    of `left_out`. Letter codes do not carry over from one corpus to another, so each has its own tables.
    """

    layout: str
    language: str
    clips: int
    pattern: str
    emotions: Mapping[str, str] | None = None  # code → word; None: the code is the word
    speakers: Mapping[str, str] = field(default_factory=dict)  # those that are renamed
    genders: Mapping[str, str] = field(default_factory=dict)  # by the group gender, else by the speaker
    other_gender: str | None = None  # of speakers that are not in `genders`
    texts: Callable[[str], str | None] = lambda text: None
    languages: Mapping[str, str] = field(default_factory=dict)  # speaker → another language
    left_out: str | None = None  # pattern of those that are damaged, or are no speech


def find_files(src: Path, corpus: str, endings: Collection[str] = (".wav",)) -> list[Path]:
    """Every recording below a folder, sorted. Raises `UserError` where there is none."""
    if not os.path.isdir(src):  # noqa: PTH112  (Path.is_dir raises for a name that is too long)
        raise UserError(f"{src}: no such folder; give the folder of the {corpus} recordings")
    files = sorted(path for path in _files(src) if path.suffix.lower() in endings and not path.name.startswith("."))
    if not files:
        raise UserError(f"{src}: no {' or '.join(endings)} in it or below; give the folder of the {corpus} recordings")
    return files


def by_name(src: Path, corpus: str, naming: Naming) -> Iterator[Recording]:
    """The clips of a folder whose files are named so. A name that is not is a `UserError` that quotes `layout`."""
    pattern, left_out = re.compile(f"(?:.*/)?(?P<whole>{naming.pattern})"), re.compile(naming.left_out or "(?!)")
    found: dict[str, list[tuple[Path, re.Match[str]]]] = {}
    for path in find_files(src, corpus):
        match = pattern.fullmatch(path.with_suffix("").as_posix())
        if match is None or (naming.emotions is not None and match["emotion"] not in naming.emotions):
            raise UserError(
                f"{path}: not a file name of {corpus} ({naming.layout}); move it away or use mser pack manifest"
            )
        if not left_out.fullmatch(match["whole"]):
            found.setdefault(safe_id(f"{corpus}_{match['whole']}"), []).append((path, match))
    _check_copies({name: [path for path, _ in places] for name, places in found.items()})
    for name, [(path, match), *_] in found.items():
        word = naming.emotions[match["emotion"]] if naming.emotions is not None else match["emotion"]
        speaker = naming.speakers.get(match["speaker"], match["speaker"])
        given = match.groupdict()
        yield Recording(
            path=path,
            emotion=word,
            label=label_of(word, path, corpus, naming.layout),
            language=naming.languages.get(speaker, naming.language),
            speaker=speaker,
            corpus=corpus,
            id=name,
            source_id=name,
            gender=naming.genders.get(given.get("gender") or speaker, naming.other_gender),
            text=naming.texts(given["text"]) if given.get("text") else None,
        )


def label_of(word: str, path: Path, corpus: str, layout: str) -> str | None:
    """`to_label`, a word that is not known being a `UserError`."""
    try:
        return to_label(word)
    except KeyError:
        raise UserError(
            f"{path}: {word!r} is no emotion of {corpus} ({layout}); move it away or use mser pack manifest"
        ) from None


def _files(folder: Path) -> Iterator[Path]:
    """Every file of a folder and those below, linked ones too; a folder that several links lead to is visited once."""
    visited: set[tuple[int, int]] = set()
    for here, below, names in os.walk(folder, followlinks=True):
        status = Path(here).stat()
        if (status.st_dev, status.st_ino) in visited:
            below.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        below.sort()
        yield from (Path(here, name) for name in names)


def _check_copies(places: dict[str, list[Path]]) -> None:
    """Say how many recordings are there several times, byte for byte; `UserError` where they differ."""
    several = {name: paths for name, paths in places.items() if len(paths) > 1}
    others = {name: [path for path in paths[1:] if not _same(paths[0], path)] for name, paths in several.items()}
    if differing := [(several[name][0], paths[0]) for name, paths in others.items() if paths]:
        first = "; ".join(f"{one} is also at {other}" for one, other in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"recordings of one name and other content: {len(differing)} ({len(several)} names are there more than "
            f"once): {first}{more}; keep one of each, or name them by mser pack manifest"
        )
    if several:
        one, other = next(iter(several.values()))[:2]
        print(
            f"mser: recordings that are there more than once, byte for byte: {len(several)}; each is taken once "
            f"({one}, and not {other})",
            file=sys.stderr,
        )


def _same(one: Path, other: Path) -> bool:
    """Whether two files are a recording and its copy; two empty ones are none."""
    try:
        return one.stat().st_size > 0 and filecmp.cmp(one, other, shallow=False)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); mend or remove this file") from None
