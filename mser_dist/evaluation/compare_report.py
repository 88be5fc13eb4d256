"""A comparison as a person reads it: tables, and a folder with Markdown, CSV, a page and the plot."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from mser_dist.errors import UserError
from mser_dist.evaluation.bootstrap import DRAWS
from mser_dist.evaluation.compare import SHOWN, Comparison, Row, Section, differing
from mser_dist.evaluation.report import place_name
from mser_dist.evaluation.summary import shown
from mser_dist.evaluation.systems import cell
from mser_dist.evaluation.templates import render
from mser_dist.files import write_text
from mser_dist.tables import Table

FILES = ("compare.md", "compare.csv", "compare.html", "compare.png", "compare.svg")
MOST = 8  # parameters in a table on a terminal


def keys_of(comparison: Comparison, section: Section) -> list[str]:
    """Parameters that differ in a section, that of `by` first."""
    own = differing(run for row in section.rows for run in row.runs)
    by = [comparison.by] if comparison.by else []
    return by + [key for key in comparison.keys if key in own and key not in by]


def short(comparison: Comparison, key: str) -> str:
    """A parameter's name: without its stage, where there is one stage alone."""
    known = (key for section in comparison.sections for row in section.rows for key in row.params)
    stages = {key.partition(".")[0] for key in known} - {"eval"}
    return key if len(stages) > 1 else key.removeprefix(f"{min(stages, default='')}.")


def labels_of(comparison: Comparison, section: Section, without: str | None = None) -> list[str]:
    """What tells each row of a section from the others, in a line: its parameters and model, else its run."""
    keys = [key for key in keys_of(comparison, section) if key != without][:4]
    last = [key.rpartition(".")[2] for key in keys]
    names = {key: end if last.count(end) == 1 else short(comparison, key) for key, end in zip(keys, last, strict=True)}
    models = len({row.model for row in section.rows}) > 1
    found = []
    for row in section.rows:
        parts = [f"{name}={cell(row.params[key])}" for key, name in names.items() if key in row.params]
        found.append(", ".join([*([shown(row.model)] if models or not parts else []), *parts]))
    if without is None:
        twice = {name for name in found if found.count(name) > 1}
        found = [
            f"{name}, {row.runs[0].run}" if name in twice else name
            for name, row in zip(found, section.rows, strict=True)
        ]
    return found


def table(comparison: Comparison, section: Section, most: int | None = None) -> Table:
    """The table of a section; `most`: no more parameters than that."""
    keys = keys_of(comparison, section)[:most]
    head = [*(short(comparison, key) for key in keys), "model", "run"]
    lines = [[*(cell(row.params.get(key)) for key in keys), shown(row.model), _runs(row)] for row in section.rows]
    align = "l" * len(head)
    columns = {
        ("runs", "r"): [str(len(row.runs)) for row in section.rows],
        (SHOWN[comparison.score], "r"): [_value(row) for row in section.rows],
        ("95 %", "r"): [_between(row.interval, "{:.2f}–{:.2f}") for row in section.rows],
        ("to the best", "r"): [_difference(row) for row in section.rows],
        ("95 % of that", "r"): [_between(row.difference_interval, "{:+.3f} to {:+.3f}") for row in section.rows],
        ("", "l"): ["~" if row.undecided else "" for row in section.rows],
    }
    for (name, side), cells in columns.items():
        if not set(cells) <= ({"1"} if name == "runs" else {""}):  # a column that says nothing is left out
            head.append(name)
            align += side
            for line, text in zip(lines, cells, strict=True):
                line.append(text)
    return Table(head, [lines], align=align)


def best_of(section: Section) -> int | None:
    """Number of the best row of several, which with `by` need not be the first."""
    found = [number for number, row in enumerate(section.rows) if row.difference is None]
    return found[0] if len(section.rows) > 1 and found else None


def _runs(row: Row) -> str:
    return row.runs[0].run + (f" +{len(row.runs) - 1}" if len(row.runs) > 1 else "")


def _value(row: Row) -> str:
    return "" if row.mean != row.mean else f"{row.mean:.3f}" + ("" if row.sd is None else f" ± {row.sd:.3f}")


def _between(ends: tuple[float, float] | None, text: str) -> str:
    return "" if ends is None else text.format(*ends)


def _difference(row: Row) -> str:
    return "" if row.difference is None or row.difference != row.difference else f"{row.difference:+.3f}"


def legend(comparison: Comparison, plot: bool = True) -> list[str]:
    """What the columns mean, in lines; and the colours of the plot."""
    rows = [row for section in comparison.sections for row in section.rows]
    lines = []
    if any(row.interval for row in rows):
        lines.append(f"95 %: over the speakers, who are drawn anew ({DRAWS:,} draws).")
    if any(row.difference_interval for row in rows):
        lines.append(
            "To the best: the difference to the first row, or with --by to the best one, by the same draws for both; "
            "~ where its interval includes 0: which is better is not known."
        )
        if plot and not comparison.by:
            lines.append(
                "In the plot, blue is the best and what may be as good (~), grey what is worse, | a single run."
            )
    if any(row.sd is not None for row in rows):
        lines.append(
            "±: standard deviation over runs that differ in their seed alone; an interval is of their mean, and knows "
            "nothing of other seeds."
        )
    if max(len(section.rows) for section in comparison.sections) > 2:
        lines.append("The best of many was chosen by these clips: on others it has less of a lead.")
    return lines


def shown_parts(comparison: Comparison) -> Iterator[Table | str]:
    """What a terminal shows: titles, tables, notes."""
    for section in comparison.sections:
        yield f"{section.metric}\n{section.title}"
        yield table(comparison, section, MOST)
        notes = list(section.notes)
        if (more := len(keys_of(comparison, section)) - MOST) > 0:
            notes.append(f"{more} more of the parameters differ: --out FOLDER has all of them")
        yield from ["\n".join(notes)] if notes else []
    if said := [*comparison.notes, *legend(comparison, plot=False)]:
        yield "\n".join(said)


def as_csv(comparison: Comparison) -> str:
    """All sections, a line a row; numbers as they are."""
    places = list(dict.fromkeys(place for section in comparison.sections for place in section.over))
    head = ["section", "clips", "metric", "model", "runs", "number_of_runs", "mean", "sd", "low", "high"]
    head += ["difference", "difference_low", "difference_high", *comparison.keys]
    head += [f"{comparison.score} {place_name(*place)}" for place in places]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for number, section in enumerate(comparison.sections, 1):
        for row in section.rows:
            ends = [*(row.interval or ("", "")), row.difference, *(row.difference_interval or ("", ""))]
            what = [number, section.title, section.metric, row.model, "; ".join(run.run for run in row.runs)]
            numbers = [len(row.runs), row.mean if row.mean == row.mean else "", row.sd, *ends]
            params = [row.params.get(key) for key in comparison.keys]
            writer.writerow([*what, *numbers, *params, *(row.by_place.get(place) for place in places)])
    return text.getvalue()


def as_markdown(comparison: Comparison, command: str) -> str:
    """Tables with the picture below."""
    parts = ["# Comparison"]
    for section in comparison.sections:
        drawn = table(comparison, section)
        rows = [drawn.head, ["---:" if side == "r" else "---" for side in drawn.align], *drawn.sections[0]]
        lines = ["| " + " | ".join(_escaped(one) for one in row) + " |" for row in rows]
        parts += [f"## {_escaped(section.title)}", f"{_escaped(section.metric)}.", "\n".join(lines)]
        parts += [f"- {_escaped(note)}" for note in section.notes]
    parts += ["![metric by system](compare.png)", *map(_escaped, [*comparison.notes, *legend(comparison)])]
    return "\n\n".join([*parts, f"```bash\n{command}\n```"]) + "\n"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    for letter in "\\|<>*_`[]~":
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.split())


def check_out(folder: Path) -> None:
    """Make the folder of a comparison. `UserError` for one that cannot be, or that is something else's."""
    if any((folder / name).exists() for name in ("config.yaml", "dataset.json")):
        raise UserError(f"--out {folder} holds a run or a set of shards: name another folder for the comparison")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made ({error.strerror}): name another folder") from error


def write(comparison: Comparison, folder: Path, command: str) -> None:
    """Write `FILES` into a folder, which `check_out` has seen. `command`: that which makes them again."""
    from mser_dist.evaluation.compare_plots import draw, inline

    pictures = []
    alone = len(comparison.sections) == 1  # then its picture is that of all
    for section in [] if alone else comparison.sections:
        draw(comparison, [section], folder / "compare.svg")
        pictures.append(inline((folder / "compare.svg").read_text(encoding="utf-8")))
    draw(comparison, comparison.sections, folder / "compare.png", folder / "compare.svg")
    pictures = pictures or [inline((folder / "compare.svg").read_text(encoding="utf-8"))]
    write_text(folder / "compare.csv", as_csv(comparison))
    write_text(folder / "compare.md", as_markdown(comparison, command))
    sections: Sequence[tuple[Section, Table, int | None, str]] = [
        (section, table(comparison, section), best_of(section), picture)
        for section, picture in zip(comparison.sections, pictures, strict=True)
    ]
    told = [*comparison.notes, *legend(comparison)]
    page = render("compare.html.j2", sections=sections, notes=told, command=command)
    write_text(folder / "compare.html", page)
