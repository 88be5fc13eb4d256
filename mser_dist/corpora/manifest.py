"""Any list of recordings as a corpus: CSV, TSV or JSONL with a line for each clip."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mser_dist.corpora.lines import rows
from mser_dist.corpora.recording import Recording, safe_id, why_no_file
from mser_dist.errors import UserError
from mser_dist.shards.emotions import to_label
from mser_dist.shards.metadata import SPLITS
from mser_dist.shards.votes import Votes, check_votes

_SPLIT_ALIASES = {"dev": "val", "valid": "val", "validation": "val"}
REQUIRED_COLUMNS = ("path", "emotion", "language", "speaker")
OPTIONAL_COLUMNS = ("id", "label", "gender", "text", "split", "source_id", "corpus", "votes")
COLUMNS = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS)


@dataclass(frozen=True)
class Reading:
    """How a list is to be read that was not written for this program.

    columns: our column → what the list calls it. constants: column → its value where the list has none. words: emotion
    words (`emotions.normal`) → labels, beside those that are known. files_there: whether a missing recording is an
    error here; else whoever reads the recordings meets it.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, str | None] = field(default_factory=dict)
    files_there: bool = True

    def __post_init__(self) -> None:
        if unknown := [name for name in self.columns if name not in COLUMNS]:
            raise UserError(
                f"--column {unknown[0]}={self.columns[unknown[0]]}: there is no column {unknown[0]!r} to fill; use "
                f"{', '.join(COLUMNS)} (OURS=THEIRS)"
            )
        if both := [name for name in self.constants if name in self.columns]:
            raise UserError(f"--column {both[0]}=… and --{both[0]} both say what the {both[0]} is; give one of them")

    def theirs(self, name: str) -> str:
        return self.columns.get(name, name)

    def required(self) -> list[str]:
        """Columns that the list must have, as it calls them."""
        needed = [name for name in REQUIRED_COLUMNS if name not in self.constants]
        return [self.theirs(name) for name in dict.fromkeys((*needed, *self.columns))]

    def fields(self, row: Mapping[str, str | None], where: str) -> dict[str, str]:
        """The row by our columns; a column that was given another name is not read by its own."""
        taken = set(self.columns.values())
        result = {
            name: (row.get(self.theirs(name)) or "").strip() if name in self.columns or name not in taken else ""
            for name in COLUMNS
        }
        for name, value in self.constants.items():
            if result[name] not in ("", value):
                raise UserError(f"{where}: {name} is {result[name]!r}, and --{name} says {value!r}; leave out --{name}")
            result[name] = value
        return result


def parse_manifest(file: Path, reading: Reading | None = None) -> Iterator[Recording]:
    """Clips of a list: CSV or TSV with a header line (separated by , ; tab or |), or JSONL with an object a line.

    Columns path (relative to the list's folder, or absolute), emotion, language and speaker are required; id, label,
    gender, text, split, source_id, corpus and votes (a JSON object, {"anger": 3, "sad": 1}) may be there. A word that
    `emotions` does not know is an error unless `label` names its class. reading: for a list with other columns,
    without some, or with other words.
    """
    reading = reading or Reading()
    if why := why_no_file(file):
        raise UserError(f"{why}; give a .csv, .tsv or .jsonl with the columns {', '.join(REQUIRED_COLUMNS)}")
    seen: dict[str, int] = {}
    met: set[str] = set()  # columns
    for number, row in rows(file, reading.required()):
        met.update(row)
        clip = _manifest_clip(file, f"{file}, line {number}", row, reading)
        if clip.id in seen:
            raise UserError(
                f"{file}, line {number}: the id {clip.id!r} is also on line {seen[clip.id]}; give each clip its own id"
            )
        seen[clip.id] = number
        yield clip
    if not seen:
        raise UserError(f"{file}: lists no clip; add a line for each recording")
    if missing := [name for name in reading.columns.values() if name not in met]:  # of a .jsonl; a table has a header
        raise UserError(f"{file}: no line names {missing[0]!r}; correct --column")


def _manifest_clip(file: Path, where: str, row: Mapping[str, str | None], reading: Reading) -> Recording:
    cells = reading.fields(row, where)
    if missing := [name for name in REQUIRED_COLUMNS if not cells[name]]:
        raise UserError(
            f"{where}: no {reading.theirs(missing[0])}; every clip needs {', '.join(REQUIRED_COLUMNS)} (--column "
            "path=file says that a column has another name)"
        )
    path = file.parent / cells["path"]
    if reading.files_there and (why := why_no_file(path)):
        raise UserError(f"{where}: {why}; mend the path or remove the line")
    if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*", cells["language"]):
        raise UserError(f"{where}: {cells['language']!r} is no language code; write en, de, fa … (ISO 639)")
    split = _SPLIT_ALIASES.get(cells["split"], cells["split"]) or None
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: {split!r} is no split; use {', '.join(SPLITS)}, or leave out the column")
    try:
        label = cells["label"] or to_label(cells["emotion"], reading.words)
    except KeyError:
        raise UserError(
            f"{where}: unknown emotion {cells['emotion']!r}; correct it, or say what it is by --map (--map "
            f"{cells['emotion']}=anger, say) or by a column label with its class"
        ) from None
    gender = {"f": "female", "m": "male"}.get(cells["gender"].lower(), cells["gender"].lower()) or None
    name = safe_id(cells["id"] or str(Path(cells["path"]).with_suffix("")).lstrip("/"))
    return Recording(
        path=path,
        emotion=cells["emotion"],
        label=label,
        language=cells["language"],
        speaker=cells["speaker"],
        corpus=cells["corpus"] or safe_id(file.stem),
        id=name,
        source_id=cells["source_id"] or name,
        gender=gender,
        text=cells["text"] or None,
        split=split,
        votes=_votes(cells["votes"], where),
    )


def _votes(cell: str, where: str) -> Votes | None:
    if not cell:
        return None
    try:
        return check_votes(json.loads(cell), where)
    except (ValueError, RecursionError):
        raise UserError(f'{where}: the votes {cell[:40]!r} are no JSON; write {{"anger": 3, "sad": 1}}') from None
