"""Parallel sentences: what a recording says is looked up, and so is its translation."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from mser_dist.corpora.lines import rows
from mser_dist.errors import UserError
from mser_dist.translation.parts import NotMadeError, Sentence, Source

_LANGUAGE = re.compile(r"[a-z]{2,3}")  # ISO 639
_NOTES = ("id", "checked")


class Table:
    """Sentences in several languages, a row each; those of RAVDESS, CREMA-D, EMO-DB and EMOVO by default.

    path: a .csv, .tsv or .jsonl with a column (a name) a language, each called by its ISO 639 code, or a .json, a list
    of such objects or {"sentences": that list}. An empty cell is a sentence that is not there. A column `checked` names
    the languages whose text a speaker has checked ("de fr"; in JSON also a list); the row's others then are not. A
    column `id` is for people.

    Raises `UserError` naming file and line for what is no such table.
    """

    def __init__(self, path: Path | None = None) -> None:
        try:
            data = (files("mser_dist.translation") / "sentences.json" if path is None else path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: name a table of sentences") from error
        where = Path("sentences.json") if path is None else path
        read = _json(data, where) if where.suffix.lower() == ".json" else _lines(where)
        self._rows: list[dict[str, Sentence]] = []
        self._found: dict[tuple[str, str], int] = {}
        for line, row in read:
            sentences = _sentences(line, row)
            for language, sentence in sentences.items():
                # Of two rows with the same sentence the first is taken: what either says translates it.
                self._found.setdefault((language, _key(sentence.text)), len(self._rows))
            self._rows.append(sentences)
        if not self._rows:
            raise UserError(f"{where}: no sentences: write a line for each, with a column a language")
        self.about: dict[str, Any] = {
            "name": "table",
            "file": where.name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "sentences": len(self._rows),
        }

    def languages(self) -> set[str]:
        """Those that some sentence is there in."""
        return {language for row in self._rows for language in row}

    def sentence(self, source: Source, language: str) -> Sentence:
        """What the source says, in the language; case, punctuation and spacing of its text do not count.

        Raises `NotMadeError`: the source has no text, the table does not have it, or not in the language.
        """
        if source.text is None or not _key(source.text):
            raise NotMadeError("no transcript")
        row = self._found.get((source.language.partition("-")[0], _key(source.text)))
        if row is None:
            raise NotMadeError("its text is not in the table")
        found = self._rows[row].get(language)
        if found is None:
            raise NotMadeError(f"no sentence in {language}")
        return found


def _key(text: str) -> str:
    """Letters, their marks and digits alone."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in folded if unicodedata.category(letter)[0] in "LMN")


def _sentences(where: str, row: Mapping[str, Any]) -> dict[str, Sentence]:
    languages = [name for name in row if name not in _NOTES]
    if odd := [name for name in languages if not _LANGUAGE.fullmatch(name)]:
        raise UserError(f"{where}: {odd[0]!r} is no language code: call each column en, de, fa … (ISO 639)")
    if len(languages) < 2:
        raise UserError(f"{where}: a sentence needs two languages, one column each, called en, de, fa … (ISO 639)")
    if odd := [name for name in languages if not isinstance(row[name] or "", str)]:
        raise UserError(f"{where}: {odd[0]} is no text: write the sentence")
    checked = row.get("checked") or None
    if isinstance(checked, str):
        checked = re.findall(r"\w+", checked)
    if not isinstance(checked, (list, type(None))):
        raise UserError(f"{where}: checked is {checked!r}: list the languages whose text a speaker has checked")
    if odd := [name for name in checked or () if name not in languages]:
        raise UserError(f"{where}: checked names {odd[0]!r}, which is none of {', '.join(languages)}")
    return {
        language: Sentence(row[language].strip(), None if checked is None else language in checked)
        for language in languages
        if _key(row[language] or "")
    }


def _lines(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in rows(file, ()):
        yield f"{file}, line {number}", row


def _json(data: bytes, file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{file}{where}: not valid JSON ({error}): mend it") from None
    sentences = found.get("sentences") if isinstance(found, dict) else found
    if not isinstance(sentences, list):
        raise UserError(f'{file}: no sentences: write {{"sentences": [{{"en": …, "de": …}}, …]}}')
    for number, row in enumerate(sentences, 1):
        if not isinstance(row, dict):
            raise UserError(f'{file}, sentence {number}: not {{"en": …, "de": …}}')
        yield f"{file}, sentence {number}", row
