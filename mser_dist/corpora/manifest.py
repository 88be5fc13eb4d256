"""Any list of recordings as a corpus: CSV, TSV or JSONL with a line for each clip."""

import re
from collections.abc import Iterator
from pathlib import Path

from mser_dist.corpora.lines import rows
from mser_dist.corpora.recording import Recording, safe_id, why_no_file
from mser_dist.errors import UserError
from mser_dist.shards.emotions import to_label
from mser_dist.shards.index import SPLITS

_SPLIT_ALIASES = {"dev": "val", "valid": "val", "validation": "val"}
REQUIRED_COLUMNS = ("path", "emotion", "language", "speaker")
OPTIONAL_COLUMNS = ("id", "label", "gender", "text", "split", "source_id", "corpus")


def parse_manifest(file: Path) -> Iterator[Recording]:
    """Clips of a list: CSV or TSV with a header line (separated by , ; tab or |), or JSONL with an object a line.

    Columns path (relative to the list's folder, or absolute), emotion, language and speaker are required; id, label,
    gender, text, split, source_id and corpus may be there. A word that `emotions` does not know is an error unless
    `label` names its class.
    """
    if why := why_no_file(file):
        raise UserError(f"{why}; give a .csv, .tsv or .jsonl with the columns {', '.join(REQUIRED_COLUMNS)}")
    seen: dict[str, int] = {}
    for number, row in rows(file, REQUIRED_COLUMNS):
        clip = _manifest_clip(file, f"{file}, line {number}", row)
        if clip.id in seen:
            raise UserError(
                f"{file}, line {number}: the id {clip.id!r} is also on line {seen[clip.id]}; give each clip its own id"
            )
        seen[clip.id] = number
        yield clip
    if not seen:
        raise UserError(f"{file}: lists no clip; add a line for each recording")


def _manifest_clip(file: Path, where: str, row: dict[str, str | None]) -> Recording:
    field = {name: (row.get(name) or "").strip() for name in (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS)}
    if missing := [name for name in REQUIRED_COLUMNS if not field[name]]:
        raise UserError(f"{where}: no {missing[0]}; every clip needs {', '.join(REQUIRED_COLUMNS)}")
    path = file.parent / field["path"]
    if why := why_no_file(path):
        raise UserError(f"{where}: {why}; mend the path or remove the line")
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
