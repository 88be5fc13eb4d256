"""What stands below the table of a report: calibration, groups that differ, retrieval, and what each number means; the
same for MLflow."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mser_dist.evaluation.bootstrap import DRAWS
from mser_dist.evaluation.calibration import BINS
from mser_dist.evaluation.retrieval import RECALL_AT
from mser_dist.runs.names import Name
from mser_dist.tables import Table, count

Row = Mapping[str, Any]


def shown(model: str) -> str:
    """A model's name to a person."""
    return re.sub(r"^stage(?=\d)", "stage ", model).replace("_", " ")


def between(low: float | None, high: float | None) -> str:
    """An interval to a person."""
    return "" if low is None or high is None else f"{low:.2f}–{high:.2f}"


def below(rows: Sequence[Row], retrieval: Sequence[Row]) -> list[Table | str]:
    """Tables and definitions, in the order in which they are printed."""
    parts: list[Table | str] = [_UA]
    if any("ece" in row for row in rows):
        parts += [calibration_table(rows), _CALIBRATION]
        parts += [_VOTES] if any("soft" in row for row in rows) else []
    if differing := group_table(rows):
        parts += [differing, _GROUPS]
    if retrieval:
        parts += below_retrieval(retrieval)
    return parts


def below_retrieval(rows: Sequence[Row]) -> list[Table | str]:
    """The table of retrieval, and what it says."""
    return [retrieval_table(rows), _retrieval(rows)]


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120)


_UA = _wrapped(
    "UA: the mean of the classes' recalls; chance: that of one answer to all clips. WA: the share of clips that are "
    "named right. macroF1: the mean of the classes' F1. Classes without clips do not count. 95 %: the UA's interval "
    f"over speakers, {DRAWS:,} draws of them with all their clips; a mean's by MOVER."
)
_CALIBRATION = _wrapped(
    "majority: the WA of the one answer that most clips have. ECE: how far the probability of the likeliest label is "
    f"from the share of clips that are named right, over clips in {BINS} bins of equal width. Brier: the mean squared "
    "distance of the probabilities from the label, 0 to 2. T: the temperature that scores are divided by, fitted on "
    "the validation split of the training."
)
_VOTES = _wrapped(
    "votes: clips of which it is known what several annotators heard. TV: the total variation, half the sum of the "
    "differences of the probabilities (with T, if there is one) from the shares of the votes. JS: their Jensen-Shannon "
    "divergence in bits."
)
_GROUPS = (
    "Groups of clips by length and by gender of which two, with all labels of their language, have UAs whose intervals "
    "do not\noverlap."
)


def _retrieval(rows: Sequence[Row]) -> str:
    text = (
        "Each clip asks for those of its label among the clips of all other languages, by the cosine of embeddings. "
        "mAP: the mean average precision; 95 %: its interval over the speakers who ask. R-prec.: the share that is "
        "right among the first R, of R that there are. chance: of a random order."
    )
    if any(row["parallel"] for row in rows):
        text += (
            f" R@k: the share of clips with a parallel one (the same utterance) among the first k; chance: of k = "
            f"{RECALL_AT[0]}."
        )
    if rows[0]["drawn"] < rows[0]["clips"]:
        text += f" Of {count(rows[0]['clips'], 'clip')} {rows[0]['drawn']} were drawn for it."
    return _wrapped(text)


def _models(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def calibration_table(rows: Sequence[Row]) -> Table:
    """A line a row: how sure the model is, before and after its temperature; distances from annotators' votes."""
    voted = any("soft" in row for row in rows)
    names = {"majority": "majority", "ece": "ECE", "ece_calibrated": "with T", "brier": "Brier"}
    names |= {"brier_calibrated": "with T", "temperature": "T"}
    if all(row.get("temperature") is None for row in rows):
        names = {name: head for name, head in names.items() if head in ("majority", "ECE", "Brier")}
    head = ["model", "corpus", "language", *names.values()]
    head += ["votes", "TV", "JS"] if voted else []
    sections = []
    for model in _models(rows):
        lines = []
        for row in (row for row in rows if row["model"] == model):
            cells = [_number(row.get(name)) for name in names]
            if voted:
                soft = row.get("soft", {})
                cells += [str(soft.get("n", "")), _number(soft.get("total_variation"))]
                cells.append(_number(soft.get("jensen_shannon")))
            lines.append([shown(model), row["corpus"], row["language"], *cells])
        sections.append(lines)
    return Table(head, sections, align="lll" + "r" * (len(head) - 3))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def group_table(rows: Sequence[Row]) -> Table | None:
    """The UA by clip length and by gender, of the rows where two groups differ; None where none do."""
    sections = []
    for model in _models(rows):
        lines = []
        for row in (row for row in rows if row["model"] == model):
            lengths = {_seconds(one): one for one in row.get("by_length", [])}
            for groups in (lengths, row.get("by_gender", {})):
                if not _differ([one for one in groups.values() if one["k"] == row["k"]]):
                    continue
                for name, one in groups.items():
                    numbers = [f"{one['ua']:.3f}", between(one["ua_low"], one["ua_high"])]
                    lines.append([shown(model), row["corpus"], row["language"], name, str(one["n"]), *numbers])
        sections += [lines] if lines else []
    return Table(["model", "corpus", "language", "group", "n", "UA", "95 %"], sections, "llllrrr") if sections else None


def _differ(groups: Sequence[Row]) -> bool:
    known = [(one["ua_low"], one["ua_high"]) for one in groups if one["ua_low"] is not None]
    return any(max(one[0], other[0]) > min(one[1], other[1]) for one, other in combinations(known, 2))


def _seconds(group: Row) -> str:
    low, high = group["from"], group["to"]
    if high is None:
        return f"from {low:g} s"
    return f"{low:g} to {high:g} s" if low else f"below {high:g} s"


_MEANS = ("map", "map_chance", "r_precision", "r_precision_chance")


def retrieval_means(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By model, the means over the languages that ask; of a model of which two or more do."""
    means = {}
    for model in _models(rows):
        own = [row for row in rows if row["model"] == model and row["map"] is not None]
        if len(own) > 1:
            means[model] = {name: float(np.mean([row[name] for row in own])) for name in _MEANS}
    return means


def retrieval_table(rows: Sequence[Row]) -> Table:
    """A line for each model and language that asks, chance beside each number, and the mean over languages."""
    parallel = any(row["parallel"] for row in rows)
    head = ["retrieval", "asked in", "n", "mAP", "95 %", "chance", "R-prec.", "chance"]
    head += [f"R@{k}" for k in RECALL_AT] + ["chance"] if parallel else []
    sections, means = [], retrieval_means(rows)
    for model in _models(rows):
        lines = []
        for row in (row for row in rows if row["model"] == model):
            cells = [_number(row[name]) for name in _MEANS]
            cells.insert(1, between(row["map_low"], row["map_high"]))
            if parallel:
                recall, chance = row.get("recall", {}), row.get("recall_chance", {})
                cells += [_number(recall.get(str(k))) for k in RECALL_AT] + [_number(chance.get(str(RECALL_AT[0])))]
            lines.append([shown(model), row["language"], str(row["n"]), *cells])
        if model in means:
            cells = [_number(means[model][name]) for name in _MEANS]
            cells.insert(1, "")
            lines.append([shown(model), "mean over languages", "", *cells, *[""] * (len(head) - 8)])
        sections.append(lines)
    return Table(head, sections, align="ll" + "r" * (len(head) - 2))


def flat(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows' texts and numbers, under the same names in all of them."""
    names = {name: None for row in rows for name, value in row.items() if not isinstance(value, (dict, list))}
    return [{name: row.get(name) for name in names} for row in rows]


def numbers(rows: Iterable[Row], found: Sequence[Row]) -> dict[Name, float]:
    """What MLflow gets of calibration, of annotators' votes and of retrieval."""
    result: dict[Name, float] = {}
    for row in rows:
        place = (row["model"], row["corpus"], row["language"])
        told = {**row, "jensen_shannon": row.get("soft", {}).get("jensen_shannon")}
        for name in ("ece", "ece_calibrated", "brier", "brier_calibrated", "jensen_shannon"):
            if told.get(name) is not None:
                result[name, *place] = told[name]
    for row in found:
        result |= {
            (name, row["model"], row["language"]): row[name] for name in ("map", "r_precision") if row[name] is not None
        }
    for model, mean in retrieval_means(found).items():
        result |= {(name, model, "mean"): mean[name] for name in ("map", "r_precision")}
    return result
