"""The sections of a report's page, each of what there is to show; an empty one is left out of the page."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.evaluation import page_svg
from mser_dist.evaluation.evaluated import Behind, Evaluated, confusion
from mser_dist.evaluation.means import macro_interval, macro_ua
from mser_dist.evaluation.page_map import flatten_map
from mser_dist.evaluation.report import ADAPTED, place_name, shown
from mser_dist.tables import Table

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """SVG with a caption; folded: shown when asked for. legend: of its marks (colour, shape, name, count)."""

    caption: str
    svg: str
    folded: bool = False
    legend: Sequence[tuple[int, int, str, int]] = ()


@dataclass(frozen=True)
class Matrix:
    """Confusion of a model in one place: (label, its clips, [(count, share, the answer)]). folded: as of `Picture`."""

    caption: str
    folded: bool
    labels: Sequence[str]
    lines: Sequence[tuple[str, int, Sequence[tuple[int, float, str]]]]


@dataclass(frozen=True)
class Matrices:
    """Those of a model; folded: shown when asked for."""

    model: str
    folded: bool
    tables: Sequence[Matrix]
    classes: Table


def where(row: Row) -> str:
    """A row's clips, to a person."""
    return place_name(row["corpus"] or "a corpus without a name", row["language"] or "a language without a name")


def is_adapted(row: Row) -> bool:
    return str(row["model"]).endswith(ADAPTED)


def in_order(rows: Iterable[Row]) -> list[tuple[Any, Any]]:
    """Corpus and language of rows; those that no row was trained on first."""
    seen: dict[tuple[Any, Any], bool] = {}
    for row in rows:
        place = row["corpus"], row["language"]
        seen[place] = seen.get(place, False) or bool(row["seen_language"])
    return sorted(seen, key=lambda place: (seen[place], str(place[1]), str(place[0])))


# ---- UA


def means(evaluated: Evaluated) -> list[dict[str, Any]]:
    """The mean UA of each model over unseen and over seen languages, as `report.means` has it or by the rows."""
    if found := evaluated.report.get("means"):
        return list(found)
    result = []
    for model in evaluated.models:
        for seen in (False, True):
            value = macro_ua(evaluated.rows, model, seen)
            if value == value:
                low, high = macro_interval(evaluated.rows, model, seen) or (None, None)
                mine = [row for row in evaluated.rows if row["model"] == model and row["seen_language"] is seen]
                number = len(mine)
                result.append(
                    {"model": model, "seen": seen, "ua": value, "low": low, "high": high, "n_languages": number}
                )
    return result


def ua_pictures(evaluated: Evaluated, others: Mapping[str, Sequence[Row]]) -> Iterator[tuple[str, list[Picture]]]:
    """UA of every model in each place, (title, pictures): first of models as they are, then of adapted ones.

    others: rows of baselines on the same clips, by what they are called.
    """
    every = [*evaluated.rows, *(row for rows in others.values() for row in rows)]
    for adapted, title in ((False, ""), (True, "Adapted to these clips, without their labels")):
        pictures = []
        for place in in_order(every):
            here = [row for row in evaluated.rows if (row["corpus"], row["language"]) == place]
            dots = [_dot(row, "") for row in here if is_adapted(row) == adapted]
            for name, rows in others.items():
                beside = [row for row in rows if (row["corpus"], row["language"]) == place]
                dots += [_dot(row, name) for row in beside if is_adapted(row) == adapted]
            if not dots:
                continue
            heard = any(row["seen_language"] for row in here)
            clips = f"{here[0]['n']:,} clips" if here else ""
            named = place_name(*(str(part or "?") for part in place))
            caption = f"{named}: {'heard' if heard else 'not heard'} in training, {clips}"
            chance = here[0]["chance"] if here else None
            pictures.append(Picture(caption, page_svg.forest(f"UA, {caption}", dots, chance), folded=heard))
        if pictures:
            yield title, pictures


def _dot(row: Row, of: str) -> page_svg.Dot:
    name = shown(str(row["model"]).removesuffix(ADAPTED)) + (f" ({of})" if of else "")
    kind = "model" if str(row["model"]).startswith("stage") else "baseline"
    return page_svg.Dot(name, row["ua"], row["ua_low"], row["ua_high"], kind, is_adapted(row))


# ---- confusions


def matrices(evaluated: Evaluated) -> Iterator[Matrices]:
    """The confusions of every model, from its answers, else as the report has them."""
    first = next((model for model in reversed(evaluated.models) if not model.endswith(ADAPTED)), "")
    for model in evaluated.models:
        tables, classes = [], []
        for place in in_order(evaluated.rows):
            rows = [row for row in evaluated.rows if row["model"] == model]
            for row in (row for row in rows if (row["corpus"], row["language"]) == place):
                counts = _confusion(evaluated, row)
                if counts is not None:
                    heard = "heard" if row["seen_language"] else "not heard"
                    caption = f"{where(row)}, {heard} in training"
                    tables.append(_matrix(caption, row["seen_language"], counts, evaluated.labels))
                    classes.append(_classes(where(row), counts, evaluated.labels))
        if tables:
            head = ["clips", "label", "n", "recall", "precision", "F1"]
            yield Matrices(shown(model), model != first, tables, Table(head, classes, "llrrrr"))


def _confusion(evaluated: Evaluated, row: Row) -> NDArray[np.int64] | None:
    if row["model"] in evaluated.answers:
        given = evaluated.answers[row["model"]]
        return confusion(given, given.at(row["corpus"] or "", row["language"] or ""), evaluated.labels)
    if row.get("confusion") and len(row["confusion"]) == len(evaluated.labels):
        return np.array(row["confusion"], dtype=np.int64)
    return None


def _matrix(caption: str, folded: bool, counts: NDArray[np.int64], labels: Sequence[str]) -> Matrix:
    """Labels without a clip and without an answer are left out."""
    kept = np.flatnonzero(counts.sum(0) + counts.sum(1)).tolist()
    lines = []
    for i in kept:
        n = int(counts[i].sum())
        cells = [(int(counts[i, j]), float(counts[i, j] / n) if n else 0.0, labels[j]) for j in kept]
        lines.append((labels[i], n, cells))
    return Matrix(caption, folded, [labels[j] for j in kept], lines)


def _classes(name: str, counts: NDArray[np.int64], labels: Sequence[str]) -> list[list[str]]:
    lines = []
    for i in np.flatnonzero(counts.sum(1)).tolist():
        n, hits, answered = int(counts[i].sum()), int(counts[i, i]), int(counts[:, i].sum())
        precision = f"{hits / answered:.3f}" if answered else ""
        lines.append([name, labels[i], str(n), f"{hits / n:.3f}", precision, f"{2 * hits / (n + answered):.3f}"])
    return lines


# ---- embeddings


def maps(evaluated: Evaluated) -> Iterator[tuple[str, str, list[Picture]]]:
    """(model, how it was made, by emotion and by language) of each model whose embeddings are there."""
    for model, vectors in evaluated.embeddings.items():
        found = flatten_map(vectors)
        if found is None:
            continue
        given, pictures = evaluated.answers[model], []
        heard = {row["language"] for row in evaluated.rows if row["model"] == model and row["seen_language"]}
        texts = {name: getattr(given, name)[found.drawn] for name in ("key", "label", "predicted", "language")}
        told = [
            f"{key}: {label}" + ("" if label == predicted else f", taken for {predicted}") + f", {language}"
            for key, label, predicted, language in zip(*(column.tolist() for column in texts.values()), strict=True)
        ]
        for column, title in (("label", "by emotion"), ("language", "by language")):
            names, group = np.unique(texts[column], return_inverse=True)
            if column == "label":  # in the order in which they are asked about
                order = [i for label in evaluated.labels for i in np.flatnonzero(names == label).tolist()]
                order += [i for i in range(len(names)) if i not in order]
                names, group = names[order], np.argsort(order)[group]
            shown_names = [str(name) or "no name" for name in names]
            if column == "language":
                shown_names = [name if name in heard else f"{name}, not heard" for name in shown_names]
            svg = page_svg.points(f"{shown(model)}, {title}", found.xy, group, shown_names, told)
            legend = [(*page_svg.mark(i), name, int((group == i).sum())) for i, name in enumerate(shown_names)]
            pictures.append(Picture(title, svg, legend=legend))
        yield shown(model), found.told, pictures


# ---- layers


def layers(behind: Sequence[Behind]) -> Iterator[Picture]:
    """How much of each layer of its encoder a model hears, where it has learnt that."""
    for one in behind:
        numbers = one.card.get("speech", {}).get("layers", {}).get("numbers", [])
        shares = layer_shares(one)
        if shares is not None and len(shares) == len(numbers) > 1:
            title = f"stage {one.stage}: shares of the encoder's layers"
            yield Picture(title, page_svg.bars(title, [str(number) for number in numbers], shares))


def layer_shares(one: Behind) -> list[float] | None:
    """The softmax over the layers in an export's weights; None where there is none, or it cannot be read."""
    folder = one.place / "export"
    if (
        not one.card
        or one.card["speech"].get("concat")
        or len(one.card["speech"].get("layers", {}).get("numbers", [])) < 2
    ):
        return None
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("speech*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                if "layer_mix" in file.keys():  # noqa: SIM118
                    return [float(share) for share in file.get_tensor("layer_mix").float().softmax(0)]
        except (OSError, SafetensorError):
            return None
    return None
