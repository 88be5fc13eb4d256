"""The set of the clips that are kept: shards balanced over languages, a table of the selection, a card."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mser_dist import files
from mser_dist.config.translation_keys import TranslateConfig
from mser_dist.errors import UserError
from mser_dist.progress import bar
from mser_dist.shards.writer import DatasetWriter, shard_name
from mser_dist.translation import card, made
from mser_dist.translation.made import Kept, Made
from mser_dist.translation.selection import KEPT, Outcomes, adapted, as_csv, outcome
from mser_dist.translation.sources import Block, Recordings


class _Clip(NamedTuple):
    made: Made
    where: Kept


def seal(
    out: Path, folder: Path, recordings: Recordings, blocks: list[Block], recipe: str, *, overwrite: bool = False
) -> Outcomes:
    """Write the set `out` of the clips in the block files of `folder`; returns what became of each clip.

    Raises `UserError` where not one is kept, and what `DatasetWriter` raises.
    """
    config, outcomes = recordings.config, Outcomes()
    kept: dict[str, dict[str, list[_Clip]]] = defaultdict(lambda: defaultdict(list))
    rows: list[tuple[Made, str]] = []
    backends: dict[str, Any] = {}
    there: list[Made] = []
    places: list[Kept | None] = []
    for block in bar(blocks, title="select", unit="block", total=len(blocks), delay=2, leave=False):
        found = made.read(folder / f"{block.name}.tar", block.recipe)
        if found is None:
            raise UserError(f"{folder / block.name}.tar is damaged or gone: the same command makes it again")
        there += [one for one, _ in found]
        places += [where for _, where in found]
    for one, where in zip(adapted(there) if config.selection.adapt else there, places, strict=True):
        what = outcome(one, config.selection)
        outcomes.add(one, what)
        rows.append((one, what))
        if what == KEPT and where is not None:
            kept[one.facts["split"]][one.facts["language"]].append(_Clip(one, where))
            for name in ("text", "speech", "whisper", "scorer"):
                about = (one.meta or {})["translation"][name]
                if about is None:
                    continue
                backends.setdefault(name, {})[files.digest(about)] = about
    if not kept:
        why = ", ".join(f"{reason}: {outcomes.total(reason)}" for reason in outcomes.reasons)
        raise UserError(f"{out}: not one clip is kept ({why}): see selection.*, or --keep-all; what was made stays")
    shards = _shards(kept, config)
    told = card.Told(recordings, outcomes, {name: list(each.values()) for name, each in backends.items()})
    made_by = told.as_json() | {"recipe": recipe}
    recipes = {file: _recipe(clips) for file, clips in shards.items()}
    name = f"{Path(recordings.path).name}-{'-'.join(config.to)}"
    with DatasetWriter(
        out, name, made_by, shard_samples=config.shard_clips, recipes=recipes, overwrite=overwrite, progress=True
    ) as writer:
        todo = [(file, clips) for file, clips in shards.items() if file not in writer.kept]
        with bar(title="write", unit="clip", total=sum(len(clips) for _, clips in todo), delay=2, leave=False) as shown:
            for file, clips in todo:
                split = file.rpartition("-")[0]
                for one, where in clips:
                    assert one.meta is not None
                    writer.write(split, one.key, where.read(), "flac", one.meta, one.sound, one.peak)
                    shown.update()
                if len(clips) < config.shard_clips:
                    writer.end_shard(split)
        writer.beside("selection.csv", as_csv(rows, recordings.labels).encode())
        writer.beside("README.md", told.readme(name).encode())
        for file, data in card.plots(outcomes):
            writer.beside(file, data)
    return outcomes


def _shards(kept: dict[str, dict[str, list[_Clip]]], config: TranslateConfig) -> dict[str, list[_Clip]]:
    """The clips of each shard: all languages have their share of each, in the order of their recordings."""
    found = {}
    for split, languages in sorted(kept.items()):
        clips = [clip for _, clip in sorted(_spread(languages), key=lambda item: item[0])]
        for number, begin in enumerate(range(0, len(clips), config.shard_clips)):
            found[shard_name(split, number)] = clips[begin : begin + config.shard_clips]
    return found


def _spread(languages: dict[str, list[_Clip]]) -> Iterator[tuple[tuple[float, str], _Clip]]:
    """Each clip with its place among those of its language, from 0 to 1, and the language."""
    for language, clips in languages.items():
        for number, clip in enumerate(clips):
            yield ((number + 0.5) / len(clips), language), clip


def _recipe(clips: list[_Clip]) -> str:
    return files.digest([[one.key, one.meta, where.sha256] for one, where in clips])
