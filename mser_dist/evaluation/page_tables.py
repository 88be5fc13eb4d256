"""The tables of a report's page beside that of its rows: calibration, what was heard before, and what else there is."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mser_dist.evaluation import page_svg, protocols, summary
from mser_dist.evaluation.evaluated import Evaluated
from mser_dist.evaluation.page_sections import Picture, Row, in_order, is_adapted, where
from mser_dist.evaluation.report import shown
from mser_dist.tables import Table

# ---- calibration


def calibration(evaluated: Evaluated) -> tuple[Table | None, list[Picture]]:
    """What the report says of how far probabilities can be trusted: a table, and accuracy against confidence."""
    names = {"ece": "ECE", "brier": "Brier", "temperature": "temperature"}
    names |= {"ece_calibrated": "ECE, fitted", "brier_calibrated": "Brier, fitted"}
    table = row_table(evaluated.rows, names, evaluated.models)
    pictures = []
    for place in in_order(evaluated.rows):
        for row in (row for row in evaluated.rows if (row["corpus"], row["language"]) == place):
            bins, fitted = (
                [(one["confidence"], one["accuracy"], int(one["n"])) for one in row.get(name) or () if one["n"]]
                for name in ("reliability", "reliability_calibrated")
            )
            if bins:
                caption = f"{shown(row['model'])}, {where(row)}"
                folded = is_adapted(row) or bool(row["seen_language"])
                pictures.append(
                    Picture(caption, page_svg.reliability(f"reliability of {caption}", bins, fitted), folded)
                )
    return table, pictures


def row_table(rows: Sequence[Row], names: Mapping[str, str], models: Sequence[str]) -> Table | None:
    """A table of some fields of the rows, by what they are called, a section a model; None where no row has one."""
    kept = {name: title for name, title in names.items() if any(row.get(name) is not None for row in rows)}
    if not kept:
        return None
    sections = [
        [
            [shown(row["model"]), where(row), *(cell(row.get(name)) for name in kept)]
            for row in rows
            if row["model"] == model
        ]
        for model in models
    ]
    return Table(["model", "clips", *kept.values()], sections, "ll" + "r" * len(kept))


def cell(value: Any) -> str:
    """A value of a report in a table."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


# ---- what else a report may have


def ledger(evaluated: Evaluated) -> Table | None:
    """What each training had not heard of each row's clips, as the evaluation derived it; None where it did not."""
    lines: dict[tuple[str, ...], None] = {}  # several models have one training behind them
    for row in evaluated.rows:
        for stage, known in (row.get("unseen") or {}).items():
            told = ["not known" if known.get(name) is None else cell(known[name]) or "none" for name in _UNSEEN]
            note = "; ".join(known.get("unknown") or ())
            if "name" in known:  # the pretrained encoder's
                note = (
                    f"{known['name'] or 'from scratch'}: {known.get('declared') or 'nobody has declared what it heard'}"
                )
            lines[where(row), shown(stage), *told, note] = None
    if not lines:
        return None
    head = [
        "clips",
        "to",
        "language unseen",
        "corpus unseen",
        "labels unseen",
        "speakers shared",
        "clips shared",
        "note",
    ]
    return Table(head, [[[*line] for line in lines]], "lllllrrl")


_UNSEEN = ("language", "corpus", "labels", "speakers_shared", "clips_shared")


def more_tables(evaluated: Evaluated) -> Iterator[tuple[str, list[Table | str]]]:
    """(title, tables and what they mean) of what a report has beside its rows' scores."""
    rows, models = evaluated.rows, evaluated.models
    if all("protocols" in row for row in rows) and (parts := protocols.tables(rows, True)):
        yield "Other ways to ask for the label", parts
    voted = [{**row, **(row.get("soft") or {})} for row in rows]
    if table := row_table(voted, {name: name for row in rows for name in row.get("soft") or {}}, models):
        yield "Annotators' votes", [table]
    for title, field, head in (("By length", "by_length", "seconds"), ("By gender", "by_gender", "gender")):
        if table := _nested(rows, field, head):
            yield title, [table]
    if found := evaluated.report.get("retrieval"):
        yield "Retrieval across languages", [*summary.below_retrieval(found)]


def _nested(rows: Sequence[Row], field: str, head: str) -> Table | None:
    """A table of what is within a field of each row: {name: {…}}, or [{from, to, …}]."""
    lines: list[tuple[list[str], Mapping[str, Any]]] = []
    for row in rows:
        inner = row.get(field) or {}
        named = inner.items() if isinstance(inner, dict) else ((_span(one), one) for one in inner)
        for name, values in named:
            if isinstance(values, dict):
                lines.append(([shown(row["model"]), where(row), name], values))
    names = list(dict.fromkeys(name for _, values in lines for name in values if name not in ("from", "to")))
    if not names:
        return None
    cells = [[*what, *(cell(values.get(name)) for name in names)] for what, values in lines]
    return Table(["model", "clips", head, *names], [cells], "lll" + "r" * len(names))


def _span(one: Mapping[str, Any]) -> str:
    end = one.get("to")
    return f"{one.get('from', 0):g} and longer" if end is None else f"{one.get('from', 0):g} to {end:g}"
