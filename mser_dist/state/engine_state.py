"""A DeepSpeed engine's training state as files without pickle, one per rank, that any number of ranks can read back.

Each rank writes its own elements of every parameter, as flat tensors under ``master/NAME`` (float32 weights),
``exp_avg/NAME`` and ``exp_avg_sq/NAME`` (or what else the optimizer keeps), ``frozen/NAME`` and ``buffer/NAME``. The
file's metadata says which elements they are, and holds the small state in JSON. All is kept by parameter name, so that
files of one world size or ZeRO stage are read under another.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mser_dist import deepspeed_parts
from mser_dist.deepspeed_parts import Part
from mser_dist.errors import UserError
from mser_dist.files import shows
from mser_dist.ranks import distributed
from mser_dist.state import manifest
from mser_dist.state.seal import LATE

# How a group is stepped, not what the step is: it follows the device, not the checkpoint.
_NOT_HYPER = {"params", "foreach", "fused", "capturable", "differentiable"}

AVERAGE = "ema"  # the slot of an exponential average of the weights, see `training.average`

Description = dict[str, Any]


def collect(engine: Any, reloaded: Set[str] = frozenset()) -> tuple[dict[str, Tensor], Description]:
    """This rank's part of the state of a `deepspeed.DeepSpeedEngine`, between two optimizer steps. Collective.

    reloaded: frozen parameters that are left out, as every start loads them from somewhere else.
    The tensors are 1-D and mostly views of live state, on its device: copy them before the next step.
    The description is JSON.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    optimizer = deepspeed_parts.optimizer(engine)
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Any] = {}
    slots: set[str] = set()

    def add(part: Part, step: float | None, named: dict[str, Tensor]) -> None:
        first, count = _share(part, rank, world)
        parameters[part.name] = {"shape": list(part.shape), "start": part.start + first, "count": count, "step": step}
        if count:
            for kind, tensor in named.items():
                flat = part.view(tensor).reshape(-1)
                tensors[f"{kind}/{part.name}"] = flat.narrow(0, first, count)

    groups = deepspeed_parts.trained(engine)
    steps = {id(owner): float(state["step"]) for owner, state in optimizer.state.items() if state}
    for group in groups:
        for part in group:
            state = optimizer.state.get(part.owner, {})
            kept = {slot: value for slot, value in state.items() if slot != "step"}
            slots |= kept.keys()
            add(part, steps.get(id(part.owner)), {"master": part.owner, **kept})
    for part in deepspeed_parts.frozen(engine):
        if part.name in reloaded:
            shape = list(part.shape)
            parameters[part.name] = {"shape": shape, "start": 0, "count": 0, "step": None, "reloaded": True}
        else:
            add(part, None, {"frozen": part.owner})
    buffers = _own_buffers(engine, rank)
    tensors |= {f"buffer/{name}": buffer.reshape(-1) for name, buffer in buffers.items() if buffer.numel()}
    description = {
        "rank": rank,
        "world_size": world,
        "parameters": parameters,
        "slots": sorted(slots),
        "buffers": {name: list(buffer.shape) for name, buffer in buffers.items()},
        "groups": [
            {"parameters": [part.name for part in parts], "hyper": _hyper(group)}
            for parts, group in zip(groups, optimizer.param_groups, strict=True)
        ],
        "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
        "loss_scaler": deepspeed_parts.scale(engine),
        "counters": deepspeed_parts.counters(engine),
    }
    return tensors, json.loads(json.dumps(description))  # a copy: the schedule gives its own live lists


def write(path: Path, tensors: dict[str, Tensor], description: Description) -> None:
    """Write what `collect` gave, the tensors on the CPU. Runs beside training: it does not hold Python's lock."""
    save_file(tensors, path, metadata={"mser": json.dumps(description)})


def restore(engine: Any, folder: Path, fork: bool = False) -> set[str]:
    """Put what all ranks wrote into a fresh engine with any number of ranks, under any ZeRO stage. Collective.

    Same world size: bit for bit. Another one: the same, but for the buffers, which are rank 0's on every rank.
    fork: the engine's own groups, hyper-parameters and schedule stay, of which that takes the number of steps; what is
    trained here and was frozen there begins with moments of zero.
    Parameters that were left out stay as they are. Returns the frozen ones that were not.
    Raises `UserError` on every rank, with nothing changed, if the files are not of this model and optimizer.
    """
    saved = saved_by_all(folder, torch.distributed.get_rank())
    groups, frozen = deepspeed_parts.trained(engine), deepspeed_parts.frozen(engine)
    optimizer = deepspeed_parts.optimizer(engine)
    buffers = dict(engine.module.named_buffers())
    persistent = set(engine.module.state_dict()) & set(buffers)
    problems = [*saved.faults(groups, frozen, fork), *saved.buffer_faults(buffers, persistent)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"the checkpoint {folder} is not of this model: {problems[0]}{more}: "
            "resume with the config that wrote it, or start a new run folder with out=…"
        )
    with deepspeed_parts.rewriting(engine):
        for parts, group in zip(groups, optimizer.param_groups, strict=True):
            for part in parts:
                if part.name not in saved.reloaded:
                    saved.copy(saved.kind(part.name), part, part.owner)
            _restore_optimizer(optimizer, group, parts, saved)
        held = [part for part in frozen if part.name not in saved.reloaded]
        for part in held:
            saved.copy(saved.kind(part.name), part, part.owner)
        _restore_buffers(engine.module, buffers, saved)
    _restore_small(engine, saved.manifest, fork)
    return {part.name for part in held}


def weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Each parameter (float32 masters; a frozen one in its own dtype) and buffer (rank 0's) of a checkpoint, whole.

    One at a time is in memory; those that were left out are not among them. Raises `UserError` where a rank's file is
    missing.
    """
    found, problem = manifest.load(folder)
    if problem:
        raise UserError(problem)
    saved = Saved(folder, found)
    for name, entry in found["parameters"].items():
        key = f"{saved.kind(name)}/{name}"
        pieces = [saved.tensor(key, rank)[:] for _, count, rank in manifest.pieces(found, name) if count]
        if pieces:
            yield name, torch.cat(pieces).view(entry["shape"])
    for name, shape in found["buffers"].items():
        if 0 not in shape:
            yield name, saved.tensor(f"buffer/{name}", 0)[:].view(shape)


def saved_by_all(folder: Path, rank: int) -> "Saved":
    """A checkpoint by its manifest, which rank 0 alone reads. Collective. Raises `UserError` on every rank."""
    found, problem = distributed.agree(manifest.load(folder) if rank == 0 else None)
    if problem:
        raise UserError(problem)
    return Saved(folder, found)


class Saved:
    """The files of all ranks of one checkpoint, each opened when something of it is wanted."""

    def __init__(self, folder: Path, found: manifest.Manifest) -> None:
        self.folder = folder
        self.manifest = found
        self.ranks: int = found["world_size"]
        self.slots: list[str] = found["slots"]
        self.steps = {name: entry["step"] for name, entry in found["parameters"].items()}
        self.reloaded = {name for name, entry in found["parameters"].items() if entry.get("reloaded")}
        self.stepped = {name for group in found["groups"] for name in group["parameters"]}
        self._open: dict[int, Any] = {}  # mapped: none of them counts against the limit on open files

    def file(self, rank: int) -> Any:
        if rank not in self._open:
            path = manifest.rank_file(self.folder, rank)
            if not shows(path, LATE):
                raise UserError(f"{path} is missing: remove the folder to resume from an older checkpoint")
            self._open[rank] = safe_open(path, "pt")
        return self._open[rank]

    def tensor(self, key: str, rank: int) -> Any:
        """A handle on one tensor of one file, that reads what it is indexed with."""
        return self.file(rank).get_slice(key)

    def own_buffers(self, rank: int) -> dict[str, list[int]]:
        """The shapes of the buffers that are in a rank's file: those that differ from rank 0's."""
        found: dict[str, list[int]] = json.loads(self.file(rank).metadata()["mser"])["buffers"]
        return found

    def kind(self, name: str) -> str:
        """What a parameter's weights were saved as."""
        return "master" if name in self.stepped else "frozen"

    def copy(self, kind: str, part: Part, target: Tensor) -> None:
        """Read the elements of `part` of ``kind/name`` into their place in `target`."""
        if not part.count:
            return
        end = part.start + part.count
        found = [
            self.tensor(f"{kind}/{part.name}", rank)[max(part.start - first, 0) : end - first]
            for first, _, rank in manifest.pieces(self.manifest, part.name, part.start, part.count)
        ]
        view = part.view(target)
        view.copy_((torch.cat(found) if len(found) > 1 else found[0]).view(view.shape))

    def faults(self, groups: list[list[Part]], frozen: list[Part], fork: bool) -> Iterable[str]:
        """How the parameters differ from the model's; in a fork they may be grouped otherwise."""
        here: dict[str, tuple[Part, int | None]]
        here = {part.name: (part, index) for index, parts in enumerate(groups) for part in parts}
        here |= {part.name: (part, None) for part in frozen}
        there = self.manifest["parameters"]
        index_there = {
            name: index for index, group in enumerate(self.manifest["groups"]) for name in group["parameters"]
        }
        for name in sorted(here.keys() | there.keys()):
            if name not in there:
                yield f"it has no parameter {name}, whose shape in the model is {list(here[name][0].shape)}"
            elif name not in here:
                yield f"its parameter {name} of shape {there[name]['shape']} is not in the model"
            elif list(here[name][0].shape) != there[name]["shape"]:
                shapes = f"{there[name]['shape']} there and {list(here[name][0].shape)} in the model"
                yield f"parameter {name} has the shape {shapes}"
            elif not fork and here[name][1] != index_there.get(name):
                groups_said = [_group_said(index) for index in (index_there.get(name), here[name][1])]
                yield f"parameter {name} is {groups_said[0]} there and {groups_said[1]} in the model"
            elif name in self.reloaded:
                continue
            elif not manifest.is_complete(self.manifest, name):
                yield f"parameter {name} is incomplete"

    def buffer_faults(self, buffers: dict[str, Tensor], persistent: set[str]) -> Iterable[str]:
        """How the persistent buffers differ from the model's; the others may be made or grown while it runs."""
        there = self.manifest["buffers"]
        for name in sorted(persistent):
            here = list(buffers[name].shape)
            if there.get(name) != here:
                yield f"buffer {name} has the shape {there.get(name, 'of nothing')} there and {here} in the model"


def _share(part: Part, rank: int, world: int) -> tuple[int, int]:
    """(first, count) of the elements that a rank writes: all it holds, or its share of what all hold."""
    if not part.everywhere:
        return 0, part.count
    return manifest.even(part.count, rank, world)


def _group_said(index: int | None) -> str:
    return "frozen" if index is None else f"trained in parameter group {index}"


def _hyper(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _NOT_HYPER}


def _own_buffers(engine: Any, rank: int) -> dict[str, Tensor]:
    """The buffers that this rank has to write: rank 0 all, the others those that differ from rank 0's."""
    buffers = {name: buffer.detach() for name, buffer in engine.module.named_buffers()}
    if torch.distributed.get_world_size() == 1 or not buffers:
        return buffers
    mine = {name: _digest(buffer) for name, buffer in buffers.items()}
    first = distributed.agree(mine)
    return {name: buffer for name, buffer in buffers.items() if rank == 0 or mine[name] != first.get(name)}


def _digest(tensor: Tensor) -> str:
    raw = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
    return f"{list(tensor.shape)} {hashlib.sha256(raw.data).hexdigest()}"


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parts: list[Part], saved: Saved
) -> None:
    """The optimizer's state of one group, as torch.optim.AdamW and DeepSpeedCPUAdam make it in their first step."""
    on_device = group.get("fused") or group.get("capturable")
    for owner, held in _by_owner(parts):
        # None: saved before the first step (but some wrappers step once when they are made), or frozen there.
        steps = {part.name: saved.steps.get(part.name) for part in held}
        step = max((step for step in steps.values() if step is not None), default=None)
        if step is None:
            optimizer.state.pop(owner, None)
            continue
        if not any(part.count for part in held):
            continue
        state = optimizer.state[owner]
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.tensor(step, dtype=torch.float32, device=owner.device if on_device else "cpu")
        else:
            state["step"] = int(step)
        for slot in saved.slots:
            if slot not in state:
                state[slot] = torch.zeros_like(owner)
            for part in held:
                if steps[part.name] is not None:
                    saved.copy(slot, part, state[slot])
                elif slot == AVERAGE:
                    part.view(state[slot]).copy_(part.view(owner))


def _by_owner(parts: list[Part]) -> list[tuple[Tensor, list[Part]]]:
    """The parts by the tensor that holds them."""
    held: dict[int, tuple[Tensor, list[Part]]] = {}
    for part in parts:
        held.setdefault(id(part.owner), (part.owner, []))[1].append(part)
    return list(held.values())


def _restore_buffers(module: torch.nn.Module, buffers: dict[str, Tensor], saved: Saved) -> None:
    """This rank's own buffers if the world size is the same, else rank 0's."""
    rank = torch.distributed.get_rank()
    first = saved.manifest["buffers"]
    same = torch.distributed.get_world_size() == saved.ranks
    own = saved.own_buffers(rank) if same and first else {}
    for name, buffer in buffers.items():
        source = rank if name in own else 0
        shape = own[name] if name in own else first.get(name)
        if shape is None or 0 in shape:
            continue
        value = saved.tensor(f"buffer/{name}", source)[:].view(shape).to(buffer.device)
        if value.shape != buffer.shape:  # not persistent, and grown in a forward pass
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, value)
        elif not torch.equal(value, buffer):  # constants are often expanded views, which cannot be written to
            buffer.copy_(value)


def _restore_small(engine: Any, description: Description, fork: bool) -> None:
    """Hyper-parameters, schedule, loss scale and counters."""
    schedule = description["scheduler"]
    if fork:
        counts = ("last_epoch", "_step_count")
        schedule = {**engine.lr_scheduler.state_dict(), **{name: schedule[name] for name in counts}}
    else:
        for group, saved in zip(deepspeed_parts.optimizer(engine).param_groups, description["groups"], strict=True):
            for key in _hyper(group).keys() & saved["hyper"].keys():
                value = saved["hyper"][key]
                group[key] = tuple(value) if isinstance(group[key], tuple) else value
    if engine.lr_scheduler is not None and schedule is not None:
        engine.lr_scheduler.load_state_dict(schedule)
    deepspeed_parts.set_scale(engine, description["loss_scaler"])
    deepspeed_parts.set_counters(engine, description["counters"])
