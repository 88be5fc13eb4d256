"""Behind the last step: the exported model, the curves, the summary."""

import time
from dataclasses import asdict
from typing import Any

from mser_dist.files import write_json
from mser_dist.models import exported
from mser_dist.ranks import distributed
from mser_dist.runs.plots import curves
from mser_dist.runs.tracking import Tracker
from mser_dist.training.setup import Run


def finish(run: Run, validation: dict[str, float], tracker: Tracker | None) -> dict[str, Any]:
    """Export the model and write the summary, which means that the run is over. Collective."""
    run.watchdog.tick("exporting")
    weights = run.engine.full_state()
    out = run.setup.out
    summary = {
        "stage": run.config.stage,
        "out": str(out),
        "steps": run.total,
        "seconds": round(time.monotonic() - run.setup.began, 1),
        "world_size": run.world.world_size,
        "zero_stage": run.engine.zero_stage,
        "attention": asdict(run.setup.attention),
        "validation": validation,
        "skipped_steps": run.engine.skipped_steps,
    }
    if tracker:
        tokenizer = getattr(run.stage, "tokenizer", None)
        exported.write(out / "export", run.stage.model, weights, _card(run), tokenizer)
        curves(tracker.rows(), out / "curves.png")
        tracker.artifact(out / "curves.png")
        tracker.artifact(out / "export" / "card.json")
        summary |= {"mlflow_run_id": tracker.run_id, "tracking_uri": tracker.uri}
        write_json(out / "summary.json", summary)
    return distributed.agree(summary)


def _card(run: Run) -> dict[str, Any]:
    """What the exported model is."""
    data, source, shards = run.config.data, run.stage.source or {}, run.setup.shards
    return {
        "stage": run.config.stage,
        "labels": data.labels,
        # What was heard in training: here, and in the run that this one builds on.
        "languages": sorted({*shards.coded["language"].names, *source.get("languages", [])}),
        "corpora": sorted({*shards.coded["corpus"].names, *source.get("corpora", [])}),
        "clips": len(run.examples),
        "max_seconds": data.max_seconds,
        "shuffled_labels": data.shuffle_labels,
        **run.stage.card(),
    }
