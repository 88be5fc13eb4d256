"""Behind the last step: the exported model, the curves, the summary."""

import time
from dataclasses import asdict
from typing import Any

import torch

from mser_dist.files import write_json
from mser_dist.models import publish
from mser_dist.models.weights import SHARD_BYTES, Writers
from mser_dist.prediction import mlflow_model
from mser_dist.ranks import distributed
from mser_dist.runs.tracking import Tracker
from mser_dist.shards.ledger import FILE, Ledger
from mser_dist.training import rescore
from mser_dist.training.facts import facts_of
from mser_dist.training.model_card import render
from mser_dist.training.setup import Run


def finish(run: Run, validation: dict[str, float], tracker: Tracker | None) -> dict[str, Any]:
    """Export the model and write the summary, which means that the run is over. Collective."""
    run.watchdog.tick("exporting")
    out = run.setup.out
    export_model(run, run.ended.get("validation", validation))
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
        **run.ended,
    }
    if tracker:
        from mser_dist.runs import plots  # with matplotlib, which the other ranks need not wait for

        plots.curves(tracker.rows(), out / "curves.png")
        tracker.artifact(out / "curves.png")
        tracker.artifact(out / "export" / "card.json")
        if run.config.tracking.enabled and run.config.tracking.model != "off":
            mlflow_model.save(out / "mlflow_model", out / "export", copy=run.config.tracking.model == "copy")
            tracker.model(out / "mlflow_model", run.config.tracking.register)
        summary |= {"mlflow_run_id": tracker.run_id, "tracking_uri": tracker.uri}
        write_json(out / "summary.json", summary)
    return distributed.agree(summary)


def export_model(run: Run, validation: dict[str, float], shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``<out>/export`` file by file; it has to answer as the model that was trained. Collective."""
    stage, main = run.stage, run.world.is_main
    expected = rescore.heard_by(stage.model, stage.scorer(), run.device)
    card = {**facts_of(run), "step": run.ended["exported_step"], **stage.card(), "rescored": rescore.record(expected)}
    out, readme = run.setup.out, ""
    if main:
        readme = render(card, out.resolve().name, validation, out, Ledger.kept(out / FILE))
    card["temperature"] = validation.get("temperature")
    publish.write(
        out / "export",
        stage.model,
        run.engine.weights(),
        card,
        getattr(stage, "tokenizer", None),
        writers=Writers(run.world.rank, run.world.world_size, shard_bytes),
        readme=readme,
        ledger=out / FILE,
        check=lambda export: rescore.check(export, expected, getattr(torch, run.config.engine.dtype)),
    )
