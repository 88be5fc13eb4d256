"""What a set of translations is, for a person and in dataset.json: sources and licences, how it was made, selection."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mser_dist import __version__
from mser_dist.tables import Table
from mser_dist.translation.licences import LICENCES, allows
from mser_dist.translation.selection import KEPT, Outcomes
from mser_dist.translation.sources import Recordings

_USE = """\
The speech is synthetic: train on it, and test on recordings. Each clip keeps the split of its recording, so that no
clip of a test became one of a training; speakers are those of the recordings, and `source_id` with `corpus` links a
clip to its recording and to its translations. Do not take it for how its languages express emotions: words are
another's, and how they are said is the recording's.
"""


class Told:
    """All that the card says. backends: by step, each that has made a clip that is kept."""

    def __init__(self, recordings: Recordings, outcomes: Outcomes, backends: dict[str, list[Any]]) -> None:
        self._recordings, self._outcomes, self._backends = recordings, outcomes, backends
        facts = [recordings.facts(int(i)) for i in recordings.clips]
        self._sources = Counter((fact["corpus"], fact["language"]) for fact in facts)

    def as_json(self) -> dict[str, Any]:
        """For dataset.json."""
        config = self._recordings.config
        return {
            "command": "mser translate",
            "version": __version__,
            "source": Path(self._recordings.path).name,
            "source_fingerprint": self._recordings.shards.fingerprint(),
            "config": asdict(config),
            "sources": [
                {"corpus": corpus, "language": language, "clips": clips, "licence": LICENCES.get(corpus)}
                for (corpus, language), clips in sorted(self._sources.items())
            ],
            "left_out": dict(sorted(self._recordings.left_out.items())),
            "backends": self._backends,
            "selection": self._outcomes.as_json(),
        }

    def readme(self, name: str) -> str:
        """README.md of the set."""
        config = self._recordings.config
        corpora = Table(
            ["corpus", "language", "clips", "licence", ""],
            [
                [
                    [corpus, language, str(clips), LICENCES.get(corpus) or "unknown", allows(LICENCES.get(corpus))]
                    for (corpus, language), clips in sorted(self._sources.items())
                ]
            ],
            align="llrll",
        )
        steps = [f"- {step}: {_line(about)}" for step, each in sorted(self._backends.items()) for about in each]
        left_out = ", ".join(f"{what}: {number}" for what, number in sorted(self._recordings.left_out.items()))
        parts = [
            f"# {name}",
            f"Recordings of acted or spontaneous emotion, said again in {', '.join(config.to)} by machines: made by "
            f"`mser translate` of mser_dist {__version__}. Every clip has the label of its recording.",
            "## What it may be used for",
            _USE.strip(),
            "## Where it comes from",
            "A clip is derived from its recording. What the publishers allow, as far as it is known here (look it up):",
            f"```\n{corpora}\n```",
            f"Recordings that were left out: {left_out or 'none'}.",
            "## How it was made",
            "\n".join(steps),
            "Each sample's JSON has, under `translation`, the hash of its recording, the words, the backends with "
            "their versions and settings, and its scores; dataset.json has the whole config.",
            "## What was kept",
            f"```\n{self._outcomes.table()}\n```",
            "selection.csv has a line for each recording and language; selection_language.svg and "
            "selection_emotion.svg draw the table.",
        ]
        return "\n\n".join(parts) + "\n"


def _line(about: Any) -> str:
    return ", ".join(_trained_on(value) if key == "trained_on" else f"{key} {value}" for key, value in about.items())


def _trained_on(ledger: Any) -> str:
    """Whose clips a scorer knows: it takes them for what it was told that they are."""
    parts = (
        f"{', '.join(part['corpora'])} ({', '.join(part['languages'])}; {part['clips']} clips)"
        for part in ledger["parts"]
    )
    return f"trained on {'; '.join(parts) or 'what is not known'}"


def plots(outcomes: Outcomes) -> Iterator[tuple[str, bytes]]:
    """(file, its bytes): bars of what was kept and dropped for which reason, by language and by emotion."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from mser_dist.runs.plots import PALETTE

    kinds = [KEPT, *outcomes.reasons]
    for field, title in ((0, "language"), (1, "emotion")):
        names = outcomes.names(field)
        figure = Figure(figsize=(7, 1.2 + 0.35 * len(names)), layout="constrained")
        axis = figure.subplots()
        begin = np.zeros(len(names))
        for number, kind in enumerate(kinds):
            clips = np.array([outcomes.of(field, name)[kind] for name in names])
            axis.barh(names, clips, left=begin, label=kind, color=PALETTE[number % len(PALETTE)])
            begin += clips
        axis.invert_yaxis()
        axis.set_xlabel("clips")
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        file = io.BytesIO()
        # No date and no random ids: equal sets are equal bytes.
        with mpl.rc_context({"svg.hashsalt": title}):
            figure.savefig(file, format="svg", metadata={"Date": None})
        yield f"selection_{title}.svg", file.getvalue()
