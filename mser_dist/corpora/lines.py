"""The lines of a manifest as text by column: its encoding, its separator and its header, each checked."""

import csv
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from mser_dist.errors import UserError
from mser_dist.shards.metadata import as_text

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_NOT_UTF8 = re.compile("[\ud800-\udfff]")  # what `surrogateescape` makes of a byte that is no UTF-8
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def rows(file: Path, required: Collection[str]) -> Iterator[tuple[int, dict[str, str | None]]]:
    """(line number, text by column) of a .csv, .tsv or .jsonl; a JSON value of any type is its text.

    UTF-8, with or without a mark at its start. In a table the separator is the one of `SEPARATORS` by which the header
    names the `required` columns. Raises `UserError` naming the line for anything else, and for a column that the header
    (or a JSON object) names twice.
    """
    kind = file.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise UserError(f"{file}: not a .csv, .tsv or .jsonl; rename or convert it")
    with file.open("rb") as start:
        if start.read(2) in _UTF16:
            raise UserError(f"{file}: UTF-16, not UTF-8 text; convert it (iconv -f UTF-16 -t UTF-8)")
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            lines = _sound(text, file)
            yield from _objects(lines, file) if kind == ".jsonl" else _table(lines, file, required)
    except csv.Error as error:
        raise UserError(f"{file}: not valid CSV ({error}); mend or convert it") from None


def _sound(lines: Iterator[str], file: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise UserError(f"{file}, line {number}: a NUL byte; take it out, or convert the file (from UTF-16?)")
        if _NOT_UTF8.search(line):
            raise UserError(f"{file}, line {number}: not UTF-8 text; convert it (iconv -f LATIN1 -t UTF-8, say)")
        yield line


def _table(lines: Iterator[str], file: Path, required: Collection[str]) -> Iterator[tuple[int, dict[str, str | None]]]:
    first = next(lines, "")
    separator = max(SEPARATORS, key=lambda one: _fit(first, one, required))  # of equals the first
    head = _cells(first, separator)
    if missing := [name for name in required if name not in head]:
        raise UserError(
            f"{file}, line 1: no column {', '.join(missing)}; the header must name {', '.join(required)}, "
            f"with a {' or '.join(SEPARATORS.values())} between two (--column path=file names another column)"
        )
    if twice := [name for name, count in Counter(head).items() if name and count > 1]:
        raise UserError(f"{file}, line 1: the column {twice[0]} is there twice; rename or remove one")
    reader = csv.reader(lines, delimiter=separator, strict=True)  # strict: a quote left open would swallow lines
    while True:
        before = reader.line_num
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{file}, line {before + 2}: not valid CSV ({error}); mend or convert it") from None
        if cells is None:
            return
        if not cells:
            continue
        number = reader.line_num + 1
        if len(cells) != len(head):
            raise UserError(
                f"{file}, line {number}: another number of fields than the header, {len(cells)} and not {len(head)}; "
                f"put texts with a {SEPARATORS[separator]} between quotes"
            )
        yield number, dict(zip(head, cells, strict=True))


def _cells(line: str, separator: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([line], delimiter=separator), [])]


def _fit(header: str, separator: str, required: Collection[str]) -> tuple[int, int]:
    cells = _cells(header, separator)
    return sum(name in cells for name in required), len(cells)


def _objects(lines: Iterator[str], file: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            value = json.loads(line, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}); each line is one object") from None
        if not isinstance(value, _Pairs):
            raise UserError(f'{where}: not a JSON object; each line is {{"path": …, "emotion": …, …}}')
        if twice := [name for name, count in Counter(name for name, _ in value.pairs).items() if count > 1]:
            raise UserError(f"{where}: {twice[0]!r} is there twice; rename or remove one")
        fields = {name: as_text(_plain(inner)) for name, inner in value.pairs}
        if odd := [name for name, text in fields.items() if text and _NOT_UTF8.search(text)]:
            raise UserError(f"{where}: {odd[0]!r} holds half a character (a lone surrogate); mend it")
        yield number, fields


class _Pairs:
    """A JSON object as it is written, a name perhaps twice."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        self.pairs = pairs


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {name: _plain(inner) for name, inner in value.pairs}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
