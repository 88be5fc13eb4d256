"""The same answers by other protocols: other scores of a label, other instructions, decoding, other sets of labels."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.evaluation.metrics import Metrics, score
from mser_dist.evaluation.summary import shown
from mser_dist.runs.names import Name
from mser_dist.tables import Table

if TYPE_CHECKING:
    from mser_dist.evaluation.report import Answers, Group
    from mser_dist.shards.shard_set import ShardSet

# Scores of labels that a scorer may tell besides, (n, K) or (n, P, K).
SCORES = ("sum", "mean", "prior", "constrained", "by_prompt")
_SENT = ("sum", "mean", "prior", "constrained", "free", "common")
_SHARES = ("constrained_agreement", "invalid_rate", "ua_seen_labels", "ua_unseen_labels", "harmonic")
DEFINITIONS = {
    "sum": "log-likelihood of a label's tokens and its end, by their sum",
    "mean": "by their mean",
    "prior": "by the sum less that where the emotion tokens are zeros, which say nothing of any clip",
    "constrained": "greedy decoding under the first instruction that can say the labels alone",
    "agree": "share of clips to which it gives the label that scores best under that instruction",
    "free": "greedy decoding of 16 tokens at most: right if it is the label's word, case and punctuation aside",
    "invalid": "share of clips whose free answer is no label's word; they count as errors",
    "prompts": "least and largest UA by one instruction (stage 2) or caption of every label (stage 1) alone, and sd",
    "native": "only labels compete that clips of the same corpus and language have",
    "common": "clips of, and answers by, the labels that every corpus and language here has",
    "seen labels": "UA over the labels that training had, all labels competing",
    "unseen labels": "over those that it did not have",
    "H": "harmonic mean of these two",
}


def masked(more: Mapping[str, NDArray[Any]], allowed: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """What a scorer tells besides, its scores -inf for labels that are not `allowed` (n, K) to compete."""
    found = dict(more)
    for name in SCORES:
        if name in more:
            may = allowed[:, None] if more[name].ndim == 3 else allowed
            found[name] = np.where(may, more[name], -np.inf).astype(more[name].dtype)
    return found


def told(groups: Sequence["Group"], answers: Mapping[str, "Answers"], shards: "ShardSet") -> list["Group"]:
    """The groups with their `protocols`: what a row of the report says of its clips by other protocols."""
    corpus, language = (shards.column(name) for name in ("corpus", "language"))
    members: dict[tuple[str, str, str], NDArray[np.bool_]] = {}
    for group in groups:
        own = answers[group.model].numbers
        members[group.model, group.corpus, group.language] = (corpus[own] == group.corpus) & (
            language[own] == group.language
        )
    everywhere = [{*answers[key[0]].reference[mine].tolist()} for key, mine in members.items()]
    common = set.intersection(*everywhere) if any(each != everywhere[0] for each in everywhere) else set()
    found = []
    for group in groups:
        mine = members[group.model, group.corpus, group.language]
        found.append(replace(group, protocols=row(answers[group.model], mine, sorted(common))))
    return found


def row(given: "Answers", mine: NDArray[np.bool_], common: Sequence[int] = ()) -> dict[str, Any]:
    """What a row says of a model's clips `mine` (n,): "protocols", UA and more by each, and what follows from them.

    common: numbers of the labels that all rows have, where they do not all have the same.
    """
    reference, scores = given.reference[mine], given.scores[mine]
    more, classes = {name: values[mine] for name, values in given.more.items()}, scores.shape[1]
    named = {name: more[name].argmax(1) for name in SCORES if name in more and name != "by_prompt"}
    if "free" in more:
        named["free"] = np.where(more["free"] < 0, classes, more["free"])  # no label is one that no clip has
    found: dict[str, Any] = {name: _told(score(reference, answer, classes + 1)) for name, answer in named.items()}
    result: dict[str, Any] = {"protocols": found}
    native = np.isin(np.arange(classes), reference)
    found["native"] = _told(score(reference, np.where(native, scores, -np.inf).argmax(1), classes))
    if len(common) > 1:
        asked = np.isin(reference, common)
        only = np.where(np.isin(np.arange(classes), common), scores, -np.inf)[asked]
        found["common"] = _told(score(reference[asked], only.argmax(1), classes))
    first = scores
    if "by_prompt" in more:
        by_prompt = more["by_prompt"]  # (n, P, K)
        each = [_told(score(reference, by_prompt[:, p].argmax(1), classes)) for p in range(by_prompt.shape[1])]
        found |= {f"prompt {p}": metrics for p, metrics in enumerate(each, 1)}
        uas = np.array([metrics["ua"] for metrics in each])
        sd = float(uas.std(ddof=1)) if len(uas) > 1 else 0.0
        spread = {"ua_min": float(uas.min()), "ua_max": float(uas.max()), "ua_sd": sd, "prompts": len(uas)}
        result["prompt_spread"] = spread
        first = by_prompt[:, 0]
    if "constrained" in more:
        result["constrained_agreement"] = float((named["constrained"] == first.argmax(1)).mean())
    if "free" in more:
        result["invalid_rate"] = float((more["free"] < 0).mean())
    if given.known is not None:
        result |= _apart(score(reference, scores.argmax(1), classes), np.isin(np.arange(classes), [*given.known]))
    return result


def _told(metrics: Metrics) -> dict[str, float]:
    return {name: getattr(metrics, name) for name in ("ua", "wa", "macro_f1", "n", "k")}


def _apart(metrics: Metrics, known: NDArray[np.bool_]) -> dict[str, float]:
    """UA over the labels that training had and over those that it did not have, and their harmonic mean (generalised
    zero-shot learning, arXiv 1707.00600); nothing where the clips have labels of one kind alone."""
    support = metrics.confusion.sum(1)
    there = support > 0
    recall = metrics.confusion.diagonal() / np.maximum(support, 1)
    if not (there & known).any() or not (there & ~known).any():
        return {}
    seen, unseen = float(recall[there & known].mean()), float(recall[there & ~known].mean())
    both = 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0
    return {"ua_seen_labels": seen, "ua_unseen_labels": unseen, "harmonic": both}


def tables(rows: Sequence[Mapping[str, Any]], asked: bool) -> list[Table | str]:
    """What stands below the main table: UA by protocol, where it is `asked` for, and by sets of labels, where those of
    the rows differ or training lacked some; what their columns mean behind each."""
    found: list[Table | str] = []
    if asked:
        found += _table(rows, ("sum", "mean", "prior", "constrained", "agree", "free", "invalid", "prompts", "sd"))
    if any("common" in row["protocols"] or "harmonic" in row for row in rows):
        found += _table(rows, ("native", "common", "seen labels", "unseen labels", "H"))
    return found


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[Table | str]:
    cells = [[_cell(row, column) for column in columns] for row in rows]
    used = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    if not used:
        return []
    sections = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = zip(rows, cells, strict=True)
        sections.append(
            [
                [shown(model), row["corpus"], row["language"], *(line[i] for i in used)]
                for row, line in lines
                if row["model"] == model and any(line)
            ]
        )
    head = ["UA", "corpus", "language", *(columns[i] for i in used)]
    meant = [f"{columns[i]}: {DEFINITIONS[columns[i]]}" for i in used if columns[i] in DEFINITIONS]
    return [Table(head, [s for s in sections if s], align="lll" + "r" * len(used)), "\n".join(meant)]


def numbers(rows: Sequence[Mapping[str, Any]], asked: bool) -> dict[Name, float]:
    """What MLflow gets, by model, corpus and language, of what the `tables` show."""
    found: dict[Name, float] = {}
    for row in rows:
        told = {name: row[name] for name in _SHARES if name in row}
        if asked:
            told |= {f"ua_{name}": metrics["ua"] for name, metrics in row.get("protocols", {}).items() if name in _SENT}
            spread = row.get("prompt_spread", {})
            told |= {f"ua_prompts_{name}": spread[f"ua_{name}"] for name in ("min", "max", "sd") if spread}
        found |= {(name, row["model"], row["corpus"], row["language"]): value for name, value in told.items()}
    return found


def _cell(row: Mapping[str, Any], column: str) -> str:
    places = {
        "agree": "constrained_agreement",
        "invalid": "invalid_rate",
        "seen labels": "ua_seen_labels",
        "unseen labels": "ua_unseen_labels",
        "H": "harmonic",
    }
    spread = row.get("prompt_spread")
    if column == "prompts":
        return f"{spread['ua_min']:.3f}–{spread['ua_max']:.3f}" if spread else ""
    if column == "sd":
        return f"{spread['ua_sd']:.3f}" if spread else ""
    value = row.get(places[column]) if column in places else row["protocols"].get(column, {}).get("ua")
    return "" if value is None else f"{value:.3f}"
