"""What a training knows of its data and an export's card tells; kept in the run folder, for exports of any step."""

from pathlib import Path
from typing import Any

from mser_dist.errors import UserError
from mser_dist.files import read_json, whole, write_json
from mser_dist.models.exported import STATISTICS
from mser_dist.models.normalize import Statistics
from mser_dist.training.setup import Run

FILE = "facts.json"


def facts_of(run: Run) -> dict[str, Any]:
    """What was heard in training: here, and in the run that this one builds on."""
    data, source, shards = run.config.data, run.stage.source or {}, run.setup.shards
    return {
        "stage": run.config.stage,
        "labels": data.labels,
        "languages": sorted({*shards.coded["language"].names, *source.get("languages", [])}),
        "corpora": sorted({*shards.coded["corpus"].names, *source.get("corpora", [])}),
        "clips": len(run.examples),
        "max_seconds": data.max_seconds,
        "shuffled_labels": data.shuffle_labels,
        "bases": run.bases,
    }


def keep(run: Run) -> None:
    """Write the facts, and the statistics that features are normalised by, into the run folder. Rank 0 alone."""
    write_json(run.setup.out / FILE, facts_of(run))
    if (statistics := run.stage.model.speech.statistics) is not None:
        with whole(run.setup.out / STATISTICS) as staging:
            statistics.without_speakers().save(staging)


def kept(out: Path, normalize: str) -> tuple[dict[str, Any], Statistics | None]:
    """The facts and statistics of a run folder. Raises `UserError` where a start of an older version left none."""
    if not (out / FILE).is_file():
        raise UserError(
            f"{out} has no {FILE}, which a training writes when it starts (from version 0.3.0 on): start it again to "
            "write it, or use the export that a finished run has"
        )
    return read_json(out / FILE), None if normalize == "none" else Statistics.load(out / STATISTICS)
