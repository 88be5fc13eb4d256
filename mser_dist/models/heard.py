"""What an export's training heard: by its ledger, or by its card where an older version kept none."""

from pathlib import Path
from typing import Any

from mser_dist.models.exported import read_card
from mser_dist.shards.ledger import FILE, TRAINING, Ledger, Part


def ledger_of(export: Path) -> Ledger:
    """The ledger of an export. Raises `UserError` where it is damaged, or the card names one that is not there."""
    card = read_card(export)
    if FILE in card["files"]:
        return Ledger.load(export / FILE)
    return unknown(export.resolve().parent.name, card)


def ledger_of_run(run: Path, facts: dict[str, Any] | None = None) -> Ledger:
    """The ledger that a training writes into its folder when it starts; of an older version's, by its `facts`."""
    if (run / FILE).is_file():
        return Ledger.load(run / FILE)
    return unknown(run.resolve().name, facts or {})


def unknown(run: str, card: dict[str, Any]) -> Ledger:
    """Of a run that has kept no ledger: which languages, corpora and labels it was trained on, by its card.

    A card names those of the stage 1 too, but not which is whose: each stage is taken to have heard all.
    """
    stage = int(card.get("stage", 1))
    languages, corpora, labels = (sorted(map(str, card.get(name, []))) for name in ("languages", "corpora", "labels"))
    stages = range(stage, 0, -1)
    parts = tuple(Part(run, number, TRAINING, languages, corpora, labels, known=False) for number in stages)
    return Ledger(parts, card.get("bases", {}).get("speech.encoder.", {}).get("name"))
