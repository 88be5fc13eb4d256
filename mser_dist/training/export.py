"""`mser export`: the model of any kept step of a run, finished or not, as an export like the one at a run's end."""

import json
from pathlib import Path
from typing import Any

import torch

from mser_dist.config.file import load_training
from mser_dist.errors import UserError
from mser_dist.files import read_json
from mser_dist.models import bases, exported, publish
from mser_dist.models.attention import choose
from mser_dist.models.llm import base_of
from mser_dist.models.weights import SHARD_BYTES, Writers
from mser_dist.shards.ledger import FILE, Ledger
from mser_dist.state import engine_state
from mser_dist.state.checkpoint import FORMAT, step_of
from mser_dist.state.seal import read_seal, seal_fault
from mser_dist.training import rescore, stages
from mser_dist.training.facts import kept
from mser_dist.training.model_card import render


def export(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    best: bool = False,
    merge: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the model of a step of `run` (default: the last one kept) to `out`, and return its step and validation.

    The model is built as its training built it and filled from the checkpoint a tensor at a time; it is written file by
    file, and before it is published it has to answer as the model that was filled. merge: adapters become a part of the
    LLM. Raises `UserError` for a step that is not kept, a damaged checkpoint, and an export that answers otherwise.
    """
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "card.json").is_file())):
        raise UserError(f"{out} is there and is no export: name another folder")
    config = load_training(str(run / "config.yaml"), [f"out={run}"])  # it may have been moved
    folder = _checkpoint(run, step, best)
    state = read_json(folder / "state.json")
    if state.get("format") != FORMAT:
        raise UserError(f"{folder} was written by mser_dist {state.get('version')}: export it with that version")
    dtype = getattr(torch, config.engine.dtype)
    stage = stages.build(config, choose("sdpa", dtype, "cpu"), "cpu", {})
    if held := state.get("bases"):  # what no checkpoint holds, and the model was built with just now
        remedy = "the checkpoint does not hold them: put the former ones back"
        bases.check_same(held, bases.digests(stage.bases), remedy)
    model: Any = exported.cast(stage.model, dtype).eval()
    if model.speech.frozen is not None:
        model.speech.frozen.to("cpu", dtype)  # as the training had it
    _fill(model, folder)
    facts, statistics = kept(run, model.speech.normalize)
    model.speech.statistics = statistics
    if stage_2 := isinstance(stage, stages.Instruct):
        stage.check()
    expected = rescore.heard_by(model, stage.scorer(), "cpu")
    if merge:
        if not (stage_2 and hasattr(model.llm, "peft_config")):
            raise UserError(f"{run}: --merge is of adapters, and this run has none (llm.lora)")
        model.llm = base_of(model.llm.merge_and_unload())
    validation = _notes(run).get(step_of(folder), {})
    card = {**facts, **stage.card(), "rescored": rescore.record(expected)}
    card["temperature"] = validation.get("temperature")
    publish.write(
        out,
        model,
        model.state_dict(),
        card,
        getattr(stage, "tokenizer", None),
        writers=Writers(shard_bytes=shard_bytes),
        readme=render(card, out.resolve().name, validation, run, Ledger.kept(run / FILE)),
        ledger=run / FILE,
        check=lambda staging: rescore.check(staging, expected, dtype),
    )
    return {"step": step_of(folder), "validation": validation, "out": str(out)}


def _notes(run: Path) -> dict[int, dict[str, float]]:
    """The validations of a run by step."""
    try:
        return {
            int(step): found
            for step, found in json.loads((run / "validations.json").read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, AttributeError):
        return {}


def _checkpoint(run: Path, step: int | None, best: bool) -> Path:
    """The checkpoint of a step, whole. Raises `UserError` where there is none."""
    found = {step_of(p): p for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdecimal()}
    if not found:
        raise UserError(f"{run} has no checkpoint to export: let it train until it has saved one")
    there = f"kept are {', '.join(map(str, sorted(found)))}"
    if best:
        notes = {number: note["ua"] for number, note in _notes(run).items() if number in found and "ua" in note}
        if not notes:
            raise UserError(f"{run}: no kept step was validated, so none is the best ({there}): name one with --step")
        step = max(notes, key=lambda number: (notes[number], number))
    step = max(found) if step is None else step
    if step not in found:
        raise UserError(f"{run} keeps no step {step}: {there} (train.keep)")
    sealed, fault = read_seal(found[step])
    if fault := fault or seal_fault(found[step], sealed):
        raise UserError(f"{run}: {fault}: the checkpoint is damaged; name another step ({there})")
    return found[step]


@torch.no_grad()
def _fill(model: Any, folder: Path) -> None:
    """Put a checkpoint's weights into a model, one at a time."""
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    persistent = set(model.state_dict())
    filled = set()
    for name, tensor in engine_state.weights(folder):
        place = places.get(name)
        if place is not None and place.shape == tensor.shape:
            place.copy_(tensor)
            filled.add(name)
        elif place is None or name in persistent:
            raise UserError(f"{folder} is not of the model that config.yaml builds: {name} differs: restore the config")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := sorted(trained - filled):
        raise UserError(f"{folder} lacks {missing[0]}, which is trained: it is damaged; name another step")
