"""A run's model published as its export: all files under a staging name, then one rename.

Each rank writes files of its own, sums them up and puts them on the disk; rank 0 writes what is small.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from mser_dist import __version__
from mser_dist.errors import UserError
from mser_dist.files import file_sha256, fsync_tree, write_json
from mser_dist.models.exported import FORMAT, NO_HEADS, STATISTICS, WHOLE_FORMAT
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.models.weights import Weights, Writers, write_part
from mser_dist.ranks import distributed
from mser_dist.shards import ledger as ledger_file
from mser_dist.state.seal import LATE, shows

_REMEDY = "free space and start again"


def write(
    export: Path,
    model: nn.Module,
    weights: Weights | Mapping[str, Tensor],
    card: dict[str, Any],
    tokenizer: Any = None,
    *,
    writers: Writers | None = None,
    readme: str = "",
    ledger: Path | None = None,
    check: Callable[[Path], None] = lambda export: None,
) -> None:
    """Publish an export. Collective where there are several writers.

    Args:
        model: gives shapes and LLM config, and its frozen encoder; its own weights may be partitioned.
        weights: the trained model's, without a frozen encoder's; or its state by name. One file of them is in a rank's
            memory at a time.
        writers: None: this process alone.
        readme: the model card that people read.
        ledger: of the run, to copy; one that is not there is not.
        check: is given the whole export before it is published, and raises where it is not what it should be.

    Raises `UserError` for a disk that is full, and what `check` raises; then an earlier export is as it was.
    """
    writers = writers or Writers()
    if not isinstance(weights, Weights):
        weights = Weights.of(weights)
    speech: Any = model.speech
    frozen: FrozenEncoder | None = speech.frozen
    if frozen is not None:
        weights = weights.beside({f"speech.encoder.{n}": t for n, t in frozen.encoder.state_dict().items()})
    staging = export.with_name(export.name + ".partial")
    try:
        _together(writers, export, lambda: _begin(staging, isinstance(model, SpeechLLM)) if writers.main else None)
        mine = _together(writers, export, lambda: _write_weights(staging, model, weights, writers))
        told: list[dict[str, str]] = distributed.gather(mine) if writers.ranks > 1 else [mine]
        if not writers.main:
            return
        sums = {name: digest for part in told for name, digest in part.items()}
        if late := [name for name in sums if not shows(staging / name, LATE)]:
            raise OSError(f"{late[0]}, of another rank, does not appear")
        if isinstance(model, SpeechLLM):
            tokenizer.save_pretrained(staging / "llm")
        if speech.statistics is not None:
            speech.statistics.without_speakers().save(staging / STATISTICS)
        if ledger is not None and ledger.is_file():
            shutil.copyfile(ledger, staging / ledger_file.FILE)
        if readme:
            (staging / "README.md").write_text(readme, encoding="utf-8")
        parts = [path for path in staging.rglob("*") if path.is_file() and path.name != "README.md"]
        small = {str(path.relative_to(staging)): path for path in parts}
        sums |= {name: file_sha256(path) for name, path in small.items() if name not in sums}
        sharded = any((staging / f"{part}.safetensors.index.json").is_file() for part in ("speech", "heads"))
        known = {"format": FORMAT if sharded else WHOLE_FORMAT, "version": __version__}
        write_json(staging / "card.json", {**known, **card, "files": dict(sorted(sums.items()))})
        check(staging)
        fsync_tree(staging)
        shutil.rmtree(export, ignore_errors=True)
        staging.rename(export)
    except OSError as error:
        raise UserError(f"cannot write the export to {export}: {error}; {_REMEDY}") from error
    finally:
        if writers.main:
            shutil.rmtree(staging, ignore_errors=True)


def _together(writers: Writers, export: Path, step: Callable[[], Any]) -> Any:
    """What a step returns; where it fails on one rank, it is an error on all. Collective."""
    found = problem = None
    try:
        found = step()
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        problem = str(error)
    if writers.ranks > 1:
        problem = distributed.first(problem)
    if problem is not None:
        raise UserError(f"cannot write the export to {export}: {problem}; {_REMEDY}")
    return found


def _begin(staging: Path, with_llm: bool) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "llm" if with_llm else staging).mkdir(parents=True)


def _write_weights(staging: Path, model: Any, weights: Weights, writers: Writers) -> dict[str, str]:
    """Returns the sums of this rank's files by their names below the export."""
    sums = write_part(staging, "speech", _below(weights, "speech."), writers)
    sums |= write_part(staging, "heads", weights.part(lambda name: not name.startswith(NO_HEADS)), writers)
    if isinstance(model, SpeechLLM):
        written = _write_llm(staging / "llm", model.llm, _below(weights, "llm."), writers)
        sums |= {f"llm/{name}": digest for name, digest in written.items()}
    return sums


def _below(weights: Weights, prefix: str) -> Weights:
    return weights.part(lambda name: name.startswith(prefix), lambda name: name.removeprefix(prefix))


def _write_llm(folder: Path, llm: Any, weights: Weights, writers: Writers) -> dict[str, str]:
    """Returns the sums of this rank's files of weights."""
    if hasattr(llm, "peft_config"):
        from peft import get_peft_model_state_dict

        # peft's own choice and names, looked for by what each tensor is: their values are gathered afterwards.
        origin = {id(fact): name for name, fact in weights.facts.items()}
        chosen = {new: origin[id(fact)] for new, fact in get_peft_model_state_dict(llm, dict(weights.facts)).items()}
        if writers.main:
            llm.peft_config["default"].save_pretrained(str(folder))
        names = {old: new for new, old in chosen.items()}
        adapter = weights.part(names.__contains__, names.__getitem__)
        return write_part(folder, "adapter_model", adapter, replace(writers, shard_bytes=2**63))  # peft reads one file
    # A state dict has tied weights under all of their names; transformers ties them again as it loads.
    tied = getattr(llm, "all_tied_weights_keys", None) or {}
    ignored = {name for name, source in tied.items() if source in weights.facts}
    weights = weights.part(lambda name: name not in ignored)
    weights = _as_published(llm, weights)
    if writers.main:
        llm.config.dtype = next(fact.dtype for fact in weights.facts.values() if fact.is_floating_point())
        llm.config.architectures = [type(llm).__name__]
        llm.config.save_pretrained(folder)
        if llm.can_generate():
            llm.generation_config.save_pretrained(folder)
    return write_part(folder, "model", weights, writers)


def _as_published(llm: Any, weights: Weights) -> Weights:
    """An LLM's weights as checkpoints of its class have them, which for some are other tensors: each expert's own, say.

    One tensor of the model is converted at a time, where that gives what all of them together do; else all are.
    """

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = revert_weight_conversion(llm, dict(tensors))
        return converted

    def shapes(facts: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        return {name: fact.shape for name, fact in facts.items()}

    wanted = convert(weights.facts)
    if shapes(wanted) == shapes(weights.facts):
        return weights
    asked = [[name] for name in weights.facts]
    given = [convert({name: fact}) for name, fact in weights.facts.items()]
    if shapes({name: fact for part in given for name, fact in part.items()}) != shapes(wanted):
        asked, given = [[*weights.facts]], [wanted]
    number = {name: i for i, part in enumerate(given) for name in part}
    held: dict[int, dict[str, Tensor]] = {}  # the newest part: names are asked for in the order of the facts

    def get(name: str, place: Tensor | None) -> Tensor | None:
        if number[name] not in held:
            held.clear()
            held[number[name]] = convert(weights.part(asked[number[name]].__contains__).all(place is not None))
        return None if place is None else place.copy_(held[number[name]][name])

    return Weights({name: fact for part in given for name, fact in part.items()}, get, held.clear)
