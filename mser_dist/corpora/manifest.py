"""Any list of recordings as a corpus: CSV, TSV or JSONL with a line for each clip."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mser_dist.corpora.recording import Recording, safe_id
from mser_dist.errors import UserError
from mser_dist.shards.emotions import to_label
from mser_dist.shards.index import SPLITS

_SPLIT_ALIASES = {"dev": "val", "valid": "val", "validation": "val"}
REQUIRED_COLUMNS = ("path", "emotion", "language", "speaker")
OPTIONAL_COLUMNS = ("id", "label", "gender", "text", "split", "source_id", "corpus")


def parse_manifest(file: Path) -> Iterator[Recording]:
    """Clips of a list: CSV or TSV with a header line, or JSONL with an object a line.

    Columns path (relative to the list's folder, or absolute), emotion, language and speaker are required; id, label,
    gender, text, split, source_id and corpus may be there. A word that `emotions` does not know is an error unless
    `label` names its class.
    """
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; give a .csv, .tsv or .jsonl with the columns {', '.join(REQUIRED_COLUMNS)}"
        )
    seen: dict[str, int] = {}
    for number, row in _rows(file):
        clip = _manifest_clip(file, f"{file}, line {number}", row)
        if clip.id in seen:
            raise UserError(
                f"{file}, line {number}: the id {clip.id!r} is also on line {seen[clip.id]}; give each clip its own id"
            )
        seen[clip.id] = number
        yield clip
    if not seen:
        raise UserError(f"{file}: lists no clip; add a line for each recording")


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, fields) of a manifest."""
    kind = file.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise UserError(f"{file}: not a .csv, .tsv or .jsonl; rename or convert it")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if kind == ".jsonl":
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield number, _json_object(line, f"{file}, line {number}")
                return
            reader = csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",")
            if missing := [name for name in REQUIRED_COLUMNS if name not in (reader.fieldnames or ())]:
                raise UserError(
                    f"{file}, line 1: no column {', '.join(missing)}; "
                    f"the header must name {', '.join(REQUIRED_COLUMNS)}"
                )
            for fields in reader:
                if None in fields or None in fields.values():
                    raise UserError(
                        f"{file}, line {reader.line_num}: another number of fields than the header; "
                        "quote commas in texts"
                    )
                yield reader.line_num, fields
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; convert it (iconv -t UTF-8)") from None
    except csv.Error as error:
        raise UserError(f"{file}: not valid CSV ({error}); mend or convert it") from None


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); each line is one object") from None
    if not isinstance(value, dict):
        raise UserError(f'{where}: not a JSON object; each line is {{"path": …, "emotion": …, …}}')
    return value


def _manifest_clip(file: Path, where: str, row: dict[str, Any]) -> Recording:
    field = {}
    for name in (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS):
        value = row.get(name)
        if isinstance(value, (dict, list, bool, float)):
            raise UserError(f"{where}: {name} is {value!r}; give a text")
        field[name] = "" if value is None else str(value).strip()
    if missing := [name for name in REQUIRED_COLUMNS if not field[name]]:
        raise UserError(f"{where}: no {missing[0]}; every clip needs {', '.join(REQUIRED_COLUMNS)}")
    path = file.parent / field["path"]
    if not path.is_file():
        raise UserError(f"{where}: {path} is missing; mend the path or remove the line")
    if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*", field["language"]):
        raise UserError(f"{where}: {field['language']!r} is no language code; write en, de, fa … (ISO 639)")
    split = _SPLIT_ALIASES.get(field["split"], field["split"]) or None
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: {split!r} is no split; use {', '.join(SPLITS)}, or leave out the column")
    try:
        label = field["label"] or to_label(field["emotion"])
    except KeyError:
        raise UserError(
            f"{where}: unknown emotion {field['emotion']!r}; correct it, or add a column label with its class"
        ) from None
    gender = {"f": "female", "m": "male"}.get(field["gender"].lower(), field["gender"].lower()) or None
    name = safe_id(field["id"] or str(Path(field["path"]).with_suffix("")).lstrip("/"))
    return Recording(
        path=path,
        emotion=field["emotion"],
        label=label,
        language=field["language"],
        speaker=field["speaker"],
        corpus=field["corpus"] or safe_id(file.stem),
        id=name,
        source_id=field["source_id"] or name,
        gender=gender,
        text=field["text"] or None,
        split=split,
    )
