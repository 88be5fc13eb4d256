"""Which of the clips that were made are kept, why the others are not, and the table and plots of both."""

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.config.translation_keys import SelectionConfig
from mser_dist.tables import Table
from mser_dist.translation.made import Made

KEPT = "kept"
_COLUMNS = ("key", "source", "split", "corpus", "from", "language", "label", "speaker", "outcome")
_MEASURES = ("seconds", "level", "clipped", "cer")


def adapted(made: Sequence[Made]) -> list[Made]:
    """Clips whose scores count from what is heard in their language on the whole.

    A model of recordings hears in speech of machines some labels everywhere, and others nowhere. From each label's log
    probability its mean over the language's clips is taken, in which every label that the clips have counts alike; the
    rest is made probabilities again, of the labels that the clips have. Of one label alone nothing is told apart, and
    its clips stay as they are.
    """
    has = {one.facts["label"] for one in made}
    logs: dict[str, dict[str, list[NDArray[np.float64]]]] = defaultdict(lambda: defaultdict(list))
    for one in made:
        if scores := _scores(one, has):
            logs[one.facts["language"]][one.facts["label"]].append(_logs(scores))
    means = {
        language: np.mean([np.mean(own, 0) for own in by_label.values()], 0)
        for language, by_label in logs.items()
        if len(by_label) > 1
    }
    found = []
    for one in made:
        if (scores := _scores(one, has)) and one.facts["language"] in means:
            rest = np.exp(_logs(scores) - means[one.facts["language"]])
            values = dict(zip(sorted(scores), (rest / rest.sum()).round(4).tolist(), strict=True))
            one = replace(one, measures={**(one.measures or {}), "scores": values})
        found.append(one)
    return found


def _scores(made: Made, labels: set[str]) -> dict[str, float]:
    return {label: score for label, score in ((made.measures or {}).get("scores") or {}).items() if label in labels}


def _logs(scores: dict[str, float]) -> NDArray[np.float64]:
    """(K,) by the labels' names; scores are kept to four digits."""
    return np.log(np.maximum([scores[label] for label in sorted(scores)], 1e-4))


def outcome(made: Made, chosen: SelectionConfig) -> str:
    """`KEPT`, or why a clip is not: of several reasons the first; what could not be measured is no reason."""
    if made.reason:
        return made.reason
    if chosen.all:
        return KEPT
    of: dict[str, Any] = made.measures or {}
    scores: dict[str, float] = of.get("scores") or {}
    by_scorer = chosen.agree or chosen.min_score > 0
    reasons = (
        (of["seconds"] < chosen.min_seconds, "too short"),
        (of["seconds"] > chosen.max_seconds, "too long"),
        (of["level"] < chosen.min_level, "too faint"),
        (of["clipped"] > chosen.max_clipped, "clipped"),
        (chosen.max_cer is not None and (of.get("cer") or 0) > (chosen.max_cer or 0), "other words"),
        (bool(scores) and by_scorer and made.facts["label"] not in scores, "a label that the scorer does not know"),
        (bool(scores) and chosen.agree and heard(scores) != made.facts["label"], "other emotion"),
        (bool(scores) and scores.get(made.facts["label"], 0) < chosen.min_score, "faint emotion"),
    )
    return next((reason for holds, reason in reasons if holds), KEPT)


def heard(scores: dict[str, float]) -> str:
    """The likeliest label; of equals the first by name."""
    return min(scores, key=lambda label: (-scores[label], label))


class Outcomes:
    """How many clips were kept, and how many were not for which reason, by language and label."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()  # (language, label, outcome)

    def add(self, made: Made, what: str) -> None:
        self.counts[made.facts["language"], made.facts["label"], what] += 1

    @property
    def reasons(self) -> list[str]:
        """The most frequent one first."""
        return sorted({what for *_, what in self.counts} - {KEPT}, key=lambda what: (-self.total(what), what))

    def total(self, what: str) -> int:
        """Clips of an outcome."""
        return sum(number for key, number in self.counts.items() if key[2] == what)

    def names(self, field: int) -> list[str]:
        """0: the languages, 1: the labels."""
        return sorted({key[field] for key in self.counts})

    def of(self, field: int, name: str) -> Counter[str]:
        """Clips by outcome of a language or a label."""
        found: Counter[str] = Counter()
        for key, number in self.counts.items():
            if key[field] == name:
                found[key[2]] += number
        return found

    def as_json(self) -> dict[str, Any]:
        """{language: {label: {outcome: clips}}}."""
        tree: dict[str, Any] = {}
        for (language, label, what), number in sorted(self.counts.items()):
            tree.setdefault(language, {}).setdefault(label, {})[what] = number
        return tree

    def table(self) -> Table:
        """A row a language, then a row a label: asked for, kept, and what was not for each reason."""
        sections = []
        for field in (0, 1):
            rows = []
            for name in self.names(field):
                found = self.of(field, name)
                total = sum(found.values())
                share = f"{100 * found[KEPT] / total:.0f} %"
                rows.append([name, *map(_int, (total, found[KEPT])), share, *(_int(found[r]) for r in self.reasons)])
            sections.append(rows)
        return Table(["", "clips", KEPT, "", *self.reasons], sections)


def _int(number: int) -> str:
    return f"{number:,}"


def as_csv(rows: Iterable[tuple[Made, str]], labels: Sequence[str]) -> str:
    """A line for each recording in each language: what became of it, its measures, and a scorer's probabilities."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, *_MEASURES, "heard", *(f"p_{label}" for label in labels)])
    for made, what in rows:
        facts, of = made.facts | {"key": made.key, "outcome": what}, made.measures or {}
        scores = of.get("scores") or {}
        cells = [facts[name] for name in _COLUMNS] + [of.get(name) for name in _MEASURES]
        cells += [heard(scores) if scores else None, *(scores.get(label) for label in labels)]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()
