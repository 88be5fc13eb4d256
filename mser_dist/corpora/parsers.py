"""The corpora that `mser pack` knows: how each is laid out, how many clips it has, and what reads it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mser_dist.corpora import listed
from mser_dist.corpora.manifest import parse_manifest
from mser_dist.corpora.named import NAMED
from mser_dist.corpora.naming import by_name
from mser_dist.corpora.recording import Recording


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus. clips: what its publisher says there are, less those known to be damaged; None where that varies."""

    parse: Callable[[Path], Iterable[Recording]]
    language: str
    layout: str
    clips: int | None = None


_LISTED = {
    "dusha": Corpus(listed.parse_dusha, "ru", "crowd_train/raw_crowd_train.tsv, … and the wavs/ beside each"),
    "iemocap": Corpus(
        listed.parse_iemocap,
        "en",
        "Session1/dialog/EmoEvaluation/*.txt, Session1/sentences/wav/ (four classes: --map excitement=happy)",
        10039,
    ),
    "meld": Corpus(
        listed.parse_meld, "en", "train_sent_emo.csv, …; dia0_utt0.wav in folders named train, dev, test", 13706
    ),
    "msp-podcast": Corpus(listed.parse_msp_podcast, "en", "Labels/labels_consensus.csv and Audios/"),
    "resd": Corpus(listed.parse_resd, "ru", "train-….parquet and test-….parquet", 1396),
}


def _cremad(src: Path) -> Iterable[Recording]:
    return listed.with_cremad_votes(src, by_name(src, "cremad", NAMED["cremad"]))


CORPORA: dict[str, Corpus] = {
    "manifest": Corpus(parse_manifest, "any", "CSV, TSV or JSONL: path, emotion, language, speaker"),
    **dict(
        sorted(
            (
                {
                    name: Corpus(
                        _cremad if name == "cremad" else partial(by_name, corpus=name, naming=naming),
                        naming.language,
                        naming.layout,
                        naming.clips,
                    )
                    for name, naming in NAMED.items()
                }
                | _LISTED
            ).items()
        )
    ),
}
"""By the name that `mser pack` takes."""
