"""Systems compared: sorted, runs that differ in their seed alone taken together, and each held against the best one.

Only what was asked about the same clips, with the same labels to choose from, stands in one section; what is adapted to
the clips has one of its own. A difference has its interval by a bootstrap over the speakers of these clips, drawn alike
for both.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError
from mser_dist.evaluation.bootstrap import clusters_of, draw_difference, draw_mean, mean_interval
from mser_dist.evaluation.report import ADAPTED, place_name
from mser_dist.evaluation.systems import SEEDS, VALIDATION, Clips, Place, System, scores_of
from mser_dist.tables import count

Interval = tuple[float, float]
SHOWN = {"ua": "UA", "wa": "WA", "macro_f1": "macroF1"}


@dataclass(frozen=True, eq=False)
class Row:
    """Runs of one system that differ in their seed alone.

    values: the metric of each run. interval: of their mean. difference: to the best row's, None of that itself.
    by_place: the mean score of each place that the metric is over.
    """

    model: str
    runs: list[System]
    params: Mapping[str, str]
    values: list[float]
    by_place: Mapping[Place, float]
    interval: Interval | None = None
    difference: float | None = None
    difference_interval: Interval | None = None

    @property
    def mean(self) -> float:
        """NaN where no run has the metric."""
        return float(np.mean(self.values))

    @property
    def sd(self) -> float | None:
        """As of a sample (n - 1); None of a single run."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @property
    def undecided(self) -> bool:
        """Whether the difference may be none: its interval includes 0."""
        return self.difference_interval is not None and self.difference_interval[0] <= 0 <= self.difference_interval[1]


@dataclass(frozen=True, eq=False)
class Section:
    """What can be compared with each other, the best row first (or by the key of `by`).

    title: which clips. over: places that the metric is a mean over. chance: of the UA. notes: what else to know.
    """

    title: str
    metric: str
    rows: list[Row]
    over: list[Place]
    chance: float | None
    notes: list[str]


@dataclass(frozen=True, eq=False)
class Comparison:
    """All sections; `keys` are the parameters that differ, in any of them. by: one of all parameters."""

    score: str  # of `metrics.SCORES`
    sections: list[Section]
    keys: list[str]
    by: str | None = None
    notes: list[str] = field(default_factory=list)


def compare(
    systems: Sequence[System],
    score: str = "ua",
    by: str | None = None,
    languages: Sequence[str] = (),
    common: bool = False,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare systems.

    score: of `metrics.SCORES`. by: a parameter to sort by, or the end of its name. languages: only these; empty: those
    that no system of a section was trained on, or all where there are none. common: the clips that all predicted.
    Raises `UserError` for a key or a language that there is not.
    """
    said = list(notes)
    systems = [_in_languages(one, languages) for one in systems]
    systems = [one for one in systems if one.scores]
    if not systems:
        raise UserError(f"--language {','.join(languages)}: no run was evaluated on it: name one that the tables have")
    if common:
        systems = _in_common(systems)
    groups: dict[Any, list[System]] = {}
    for one in _without_repeats(systems, said):
        groups.setdefault(_asked(one), []).append(one)
    keys = differing(systems)
    by = _full(by, systems, keys) if by else None
    ranked = sorted(groups.values(), key=lambda own: (own[0].clips is None, own[0].validated_on != "", -len(own)))
    sections = [_section(own, score, bool(languages)) for own in ranked]
    clips = [own[0].clips for own in ranked if own[0].clips is not None]
    if len({one.digest for one in clips}) > 1:
        said.append(_apart(clips, common))
    if by:
        sections = [
            replace(one, rows=sorted(one.rows, key=lambda row: _by_value(row.params.get(by)))) for one in sections
        ]
    return Comparison(score, sections, keys, by, said)


def _asked(system: System) -> Any:
    """What was asked of a system: only those that were asked the same are compared."""
    adapted = system.model.endswith(ADAPTED)
    if system.clips is not None:
        return system.clips.digest, adapted
    return (
        system.validated_on,
        system.model if system.validated_on else "",
        adapted,
        *sorted((place, score.get("n")) for place, score in system.scores.items()),
    )


def _in_languages(system: System, languages: Sequence[str]) -> System:
    """The system in some languages alone; as it is, where none are named, and a training by its validation."""
    if not languages or VALIDATION in system.scores:
        return system
    scores = {place: score for place, score in system.scores.items() if place[1] in languages}
    if system.clips is None or system.predicted is None:
        return replace(system, scores=scores)
    mine = np.isin(system.clips.language, languages)
    return replace(system, scores=scores, clips=system.clips.some(mine), predicted=system.predicted[mine])


def _in_common(systems: Sequence[System]) -> list[System]:
    """The systems on the clips that all of them predicted; one without predictions is as it was."""
    all_clips = {one.clips.digest: one.clips for one in systems if one.clips is not None}
    shared = set.intersection(*(set(clips.names) for clips in all_clips.values())) if all_clips else set()
    if all_clips and not shared:
        raise UserError("--common: there is no clip that all of these runs predicted: leave it out, or some of them")
    mine = {digest: np.array([name in shared for name in clips.names]) for digest, clips in all_clips.items()}
    kept = {digest: clips.some(mine[digest]) for digest, clips in all_clips.items()}
    found = []
    for one in systems:
        if one.clips is not None and one.predicted is not None:
            clips, predicted = kept[one.clips.digest], one.predicted[mine[one.clips.digest]]
            one = replace(one, clips=clips, predicted=predicted, scores=scores_of(clips, predicted))
        found.append(one)
    return found


def _apart(clips: Sequence[Clips], common: bool) -> str:
    """How the clips of several sections overlap."""
    names = [set(one.names) for one in clips]
    shared = len(set.intersection(*names))
    if len(set(map(frozenset, names))) == 1:
        return "sections differ in the labels to choose from (data.labels, native_labels): their figures do not compare"
    how = "" if common or not shared else ": --common compares on these alone"
    return f"sections are of other clips ({count(shared, 'clip')} in all of them{how}): their figures do not compare"


def _without_repeats(systems: Sequence[System], notes: list[str]) -> list[System]:
    """One of those that evaluate the same trainings on the same clips: they are no further runs."""
    known: dict[Any, System] = {}
    for one in systems:
        what = (one.model, one.behind, *sorted((one.params or {}).items()), _asked(one)) if one.behind else id(one)
        if (first := known.setdefault(what, one)) is not one:
            notes.append(f"{one.run} is of the same training and clips as {first.run}, whose {one.model} is shown")
    return list(known.values())


# ---- parameters


def differing(systems: Iterable[System]) -> list[str]:
    """Keys whose values differ, seeds excepted, in a config's order. A training without a key that another training of
    its stage has differs from it; a baseline has few keys, and does not."""
    known = [one.params for one in systems if one.params is not None]
    found = []
    for key in dict.fromkeys(key for params in known for key in params):
        trained = f"{key.partition('.')[0]}.version"
        values = {params.get(key) for params in known if key in params or trained in params}
        if len(values) > 1 and key not in SEEDS:
            found.append(key)
    return found


def _full(by: str, systems: Sequence[System], keys: Sequence[str]) -> str:
    """The parameter that is meant by the end of its name."""
    known = list(dict.fromkeys(key for one in systems for key in one.params or ()))
    fit = [key for key in known if key == by] or [key for key in known if key.endswith(f".{by}")]
    if not fit:
        near = difflib.get_close_matches(by, [key.partition(".")[2] for key in known], 1)
        differ = f"these differ: {', '.join(keys[:6])}" if keys else "none of them differs"
        raise UserError(f"--by {by}: no run has it: {f'did you mean {near[0]}?' if near else differ}")
    if len(fit) > 1:
        fit = [key for key in fit if key in keys] or fit
    if len(fit) > 1:
        raise UserError(f"--by {by} may be {' or '.join(fit)}: write it in full")
    if fit[0] in SEEDS:
        raise UserError(f"--by {by}: runs that differ in their seed alone are one row: name another parameter")
    return fit[0]


def number(text: str | None) -> float | None:
    """A parameter's value as a number, if it is one."""
    try:
        return float(text or "")
    except ValueError:
        return None


def _by_value(text: str | None) -> tuple[bool, bool, float, str]:
    """Order of a parameter's values: numbers, words, none."""
    value = number(text)
    return text is None, value is None, value or 0.0, text or ""


# ---- a section


def _section(systems: Sequence[System], score: str, named: bool) -> Section:
    notes: list[str] = []
    over, which = _over(systems, named, notes)
    alike: dict[Any, list[System]] = {}
    for one in systems:
        params = {key: value for key, value in (one.params or {}).items() if key not in SEEDS}
        alike.setdefault((one.model, *sorted(params.items())) if params else id(one), []).append(one)
    rows = sorted(
        (_row(runs, score, over) for runs in alike.values()), key=lambda row: (-_or_least(row.mean), row.model)
    )
    clips = systems[0].clips
    if clips is not None:
        if alone := [place_name(*place) for place in over if not clusters_of(clips.speaker[clips.at(place)])[1]]:
            notes.append(f"no two speakers are named in {', '.join(alone)}: intervals there are of these voices alone")
        rows = _against(rows, clips, score, over)
    elif rows:
        best = rows[0].mean
        rows = [rows[0], *(replace(row, difference=row.mean - best) for row in rows[1:])]
    counted = [systems[0].scores[place].get("k") for place in over]
    chance = float(np.mean([1 / k for k in counted if k])) if score == "ua" and all(counted) else None
    return Section(_title(systems[0], score), f"{SHOWN[score]}{which}", rows, over, chance, notes)


def _or_least(value: float) -> float:
    return value if value == value else -np.inf


def _over(systems: Sequence[System], named: bool, notes: list[str]) -> tuple[list[Place], str]:
    """The places that the metric is a mean over, and how that is called."""
    places = sorted(set.intersection(*(set(one.scores) for one in systems)))
    if places == [VALIDATION]:
        return places, " in validation"
    if places and places[0][0] == "logged":
        return places, f", {places[0][1]}"
    seen = {place: [one for one in systems if place in one.seen] for place in places}
    unseen = [place for place in places if not seen[place]]
    some = [place for place in places if 0 < len(seen[place]) < len(systems)]
    if unseen and not named:
        for place in some:
            who = seen[place][0]
            notes.append(
                f"{place_name(*place)} is left out of the mean: {who.run} ({who.model}) was trained on its language"
            )
        return unseen, _mean_of(unseen, "unseen ")
    for place in some:
        notes.append(
            f"{place_name(*place)} is of a language that only some were trained on ({count(len(seen[place]), 'run')})"
        )
    return places, _mean_of(places, "")


def _mean_of(places: Sequence[Place], what: str) -> str:
    several = len({corpus for corpus, _ in places}) > 1
    listed = [place_name(*place) if several else place[1] or "no named language" for place in places]
    names = ", ".join(listed[:8]) + (", …" if len(listed) > 8 else "")
    if len(places) == 1:
        return f" on {names}{f' ({what.strip()})' if what else ''}"
    kind = "corpora and languages" if several else "languages"
    return f", mean over {len(places)} {what}{kind} ({names})"


def _title(system: System, score: str) -> str:
    if system.validated_on:
        return f"validation, {system.validated_on}"
    if system.clips is None:
        return "without predictions: whether the clips are the same is not known"
    clips = system.clips
    corpora = ", ".join(sorted(set(clips.corpus.tolist()))) or "no named corpus"
    native = ", those of a clip's corpus alone" if clips.native else ""
    adapted = ", adapted to them" if system.model.endswith(ADAPTED) else ""
    return f"{count(len(clips.key), 'clip')} of {corpora}, {count(len(clips.labels), 'label')}{native}{adapted}"


def _row(runs: list[System], score: str, over: Sequence[Place]) -> Row:
    """`runs` differ in their seed alone."""
    values = [[one.scores[place].get(score, np.nan) for place in over] for one in runs]  # (runs, places)
    by_place = dict(zip(over, np.mean(values, axis=0).tolist(), strict=True))
    means = [float(np.mean(of)) for of in values]
    ends = None
    if score == "ua" and len(runs) == 1 and runs[0].clips is None:  # as the evaluation has them
        own = [runs[0].scores[place] for place in over]
        known = [(one["ua_low"], one["ua_high"]) if one.get("ua_low") is not None else None for one in own]
        ends = mean_interval([one.get("ua", np.nan) for one in own], known)
    return Row(runs[0].model, runs, runs[0].params or {}, means, by_place, ends)


def _against(rows: Sequence[Row], clips: Clips, score: str, over: Sequence[Place]) -> list[Row]:
    """The rows with their intervals, and their differences to the first one, by the same draws of speakers."""
    parts = []
    for place in over:
        mine = clips.at(place)
        answers = [np.stack([_predicted(run)[mine] for run in row.runs]) for row in rows]  # (runs, clips) each
        parts.append((clips.reference[mine], clusters_of(clips.speaker[mine])[0], answers))
    k, found = len(clips.labels), []
    for at, row in enumerate(rows):
        drawn: list[Interval | None] = []
        differ: list[Interval | None] = []
        for reference, cluster, answers in parts:
            several = len(reference) > 1  # one clip alone says nothing of others
            drawn.append(draw_mean(reference, answers[at], cluster, k, score).interval() if several else None)
            if at:
                both = draw_difference(reference, answers[at], answers[0], cluster, k, score)
                differ.append(both.interval() if several else None)
        row = replace(row, interval=mean_interval(list(row.by_place.values()), drawn))
        if at:
            between = [row.by_place[place] - rows[0].by_place[place] for place in over]
            ends = mean_interval(between, differ)
            row = replace(row, difference=row.mean - rows[0].mean, difference_interval=ends)
        found.append(row)
    return found


def _predicted(system: System) -> NDArray[np.int64]:
    assert system.predicted is not None
    return system.predicted.astype(np.int64)
