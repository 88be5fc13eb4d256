"""All that this package touches of DeepSpeed and DeepSpeed does not promise to keep: no other file names any of it.

`INNER` lists the names. A version of DeepSpeed that has moved one is told so in plain words, by `moved`, before a step
is taken. Read with DeepSpeed 0.19.8.

DeepSpeed's public `safe_get_…`/`safe_set_…` functions are not enough for a checkpoint: they move offloaded state to the
GPU, work only after the first step, and stages 1 and 2 have no local ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mser_dist.deepspeed_module import module
from mser_dist.errors import UserError

INNER: dict[str, dict[str, str]] = {
    "the engine": {
        "basic_optimizer": "trained, rewriting: the optimizer under the wrapper, with its groups and its state",
        "global_steps": "counters",
        "global_samples": "counters",
        "skipped_steps": "counters",
        "micro_steps": "set_counters",
    },
    "the wrapper of stage 0": {
        "fp16_groups": "trained, rewriting: the weights that the model computes with, by group",
        "fp32_groups": "rewriting: their float32 masters",
    },
    "the wrapper of stage 0 for float16": {"loss_scale_config": "scaler: float16's loss scale"},
    "the loss scale of stage 0": {
        "dynamic_loss_scale": "scaler: whether it changes",
        "cur_scale": "scale",
        "cur_iter": "scale",
        "last_overflow_iter": "scale",
    },
    "the wrapper of stages 1 and 2": {
        "bit16_groups": "trained: the weights in the order in which they are flattened, by group",
        "update_lp_params": "rewriting: gives the model the masters' values",
        "_coalesce_grad_reduction": "coalesces: whether several backward passes can share one reduction",
        "loss_scaler": "scaler",
    },
    "the wrapper of stage 1 for bfloat16 with float32 gradients": {
        "bf16_groups": "trained: the weights in the order in which they are flattened, by group",
        "update_lp_params": "rewriting: gives the model the masters' values",
    },
    "the wrapper of stage 3": {
        "fp16_groups": "trained: the weights of each sub-group, in their order",
        "fp32_partitioned_groups_flat": "trained: each sub-group's float32 masters, this rank's part",
        "sub_group_to_group_id": "trained: which parameter group a sub-group belongs to",
        "checkpoint_event_prologue": "rewriting: lets go of gathered weights",
        "checkpoint_event_epilogue": "rewriting: gathers them again",
        "_reassign_or_swap_out_partitioned_parameters": "rewriting: gives the model a sub-group's masters' values",
        "_coalesce_grad_reduction": "coalesces: whether several backward passes can share one reduction",
        "loss_scaler": "scaler",
    },
    "the loss scale of ZeRO": {"dynamic": "scaler: whether it changes"},
    "the dynamic loss scale of ZeRO": {
        "cur_scale": "scale",
        "cur_iter": "scale",
        "last_overflow_iter": "scale",
        "cur_hysteresis": "scale",
    },
    "a parameter of stages 1 and 2": {
        "_hp_mapping": "trained: where this rank's part of it lies in the masters, or None",
        "grad_accum": "drop_gradients: the gradient, where it is not in `grad`",
    },
    "a parameter of stage 1 for bfloat16 with float32 gradients": {"_hp_mapping": "trained: as above"},
    "the mapping to the masters": {
        "lp_fragment_address": "trained: `start` and `numel` in the parameter",
        "hp_fragment_address": "trained: `start` in the masters",
    },
    "a parameter of stage 3": {
        "ds_id": "is_partitioned: marks a parameter of which each rank holds a part",
        "ds_numel": "numel: of the whole parameter",
        "ds_shape": "trained, frozen, shape: of the whole parameter",
        "ds_tensor": "frozen, fill, clamp, gather, own_numel: this rank's part",
        "ds_secondary_tensor": "rewriting, fill: a second copy within the node, made anew",
        "partition_numel": "trained, frozen: elements of a rank's part, with the padding",
    },
    "deepspeed.ops": {"__compatible_ops__": "skip_shared_memory_op: what DeepSpeed may compile, by name"},
}
"""Holder → its inner name → which function here needs it, and for what."""


def moved(engine: Any) -> list[str]:
    """A sentence for each name of `INNER` that this engine should have, and has not."""
    deepspeed = module()
    return [
        f"DeepSpeed {deepspeed.__version__}: {holder} ({type(thing).__name__}) has no {name} any more, "
        f"which deepspeed_parts.py needs ({use})"
        for holder, thing in holders(engine).items()
        for name, use in INNER[holder].items()
        if not hasattr(thing, name)
    ]


def check_moved(engine: Any) -> None:
    """Raise `UserError` where the installed DeepSpeed has moved what this file needs."""
    if problems := moved(engine):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}: install the version that constraints.txt names")


def holders(engine: Any) -> dict[str, Any]:
    """Those keys of `INNER` that an engine's stage and dtype have, with the objects that they speak of."""
    stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
    held: dict[str, Any] = {"the engine": engine, "deepspeed.ops": module().ops}
    parameter = next(p for p in engine.module.parameters() if p.requires_grad)
    if stage == 3:
        held |= {"the wrapper of stage 3": wrapper, "a parameter of stage 3": parameter}
    elif stage and type(wrapper).__name__ == "BF16_Optimizer":
        case = "stage 1 for bfloat16 with float32 gradients"
        held |= {f"the wrapper of {case}": wrapper, f"a parameter of {case}": parameter}
    elif stage:
        held |= {"the wrapper of stages 1 and 2": wrapper, "a parameter of stages 1 and 2": parameter}
    elif wrapper is not getattr(engine, "basic_optimizer", wrapper):
        held["the wrapper of stage 0"] = wrapper
        if engine.fp16_enabled():
            held["the wrapper of stage 0 for float16"] = wrapper
            held["the loss scale of stage 0"] = getattr(wrapper, "loss_scale_config", None)
    if stage and (scaler := getattr(wrapper, "loss_scaler", None)) is not None:
        held["the loss scale of ZeRO"] = scaler
        if getattr(scaler, "dynamic", False):
            held["the dynamic loss scale of ZeRO"] = scaler
    mappings = [getattr(p, "_hp_mapping", None) for p in engine.module.parameters()]
    if mapping := next((m for m in mappings if m is not None), None):
        held["the mapping to the masters"] = mapping
    return held


@dataclass(frozen=True)
class Part:
    """The elements ``start … start + count`` of a flattened parameter, as this rank holds them."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    count: int  # 0 where all of the parameter is elsewhere
    owner: Tensor  # holds the elements: the parameter, or a flat tensor with elements of many; the optimizer's key
    offset: int  # of the first of them in `owner`
    everywhere: bool  # every rank holds the same elements

    def view(self, tensor: Tensor) -> Tensor:
        """The elements in `tensor`: `owner`, or a tensor of the optimizer's state that is shaped like it."""
        tensor = tensor.detach()
        return tensor if self.count == tensor.numel() else tensor.narrow(0, self.offset, self.count)


def trained(engine: Any) -> list[list[Part]]:
    """The parts of the parameters that the optimizer steps, by its parameter groups; owners are fp32 masters."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    return (_of_stage_3 if stage == 3 else _of_stages_1_and_2 if stage else _of_stage_0)(engine, names)


def _of_stage_0(engine: Any, names: dict[int, str]) -> list[list[Part]]:
    """Whole everywhere; for bfloat16 and float16 a wrapper keeps masters beside the parameters."""
    wrapper = engine.optimizer
    masters = [group["params"] for group in engine.basic_optimizer.param_groups]
    parameters = masters if wrapper is engine.basic_optimizer else wrapper.fp16_groups
    return [
        [_whole(names[id(p)], p, master) for p, master in zip(*pair, strict=True) if p.numel()]
        for pair in zip(parameters, masters, strict=True)
    ]


def _of_stages_1_and_2(engine: Any, names: dict[int, str]) -> list[list[Part]]:
    """Each group flattened, and the flat tensor cut in one piece per rank."""
    found = []
    wrapper = engine.optimizer  # BF16_Optimizer where bfloat16 gradients are accumulated in float32
    parameters = wrapper.bit16_groups if hasattr(wrapper, "bit16_groups") else wrapper.bf16_groups
    for group, params in zip(engine.basic_optimizer.param_groups, parameters, strict=True):
        [owner] = group["params"]
        parts = []
        for p in params:
            start = count = offset = 0
            if p._hp_mapping is not None:
                start, count = p._hp_mapping.lp_fragment_address.start, p._hp_mapping.lp_fragment_address.numel
                offset = p._hp_mapping.hp_fragment_address.start
            parts.append(Part(names[id(p)], tuple(p.shape), start, count, owner, offset, everywhere=False))
        found.append(parts)
    return found


def _of_stage_3(engine: Any, names: dict[int, str]) -> list[list[Part]]:
    """Each parameter cut in one piece per rank, the last padded; each group's pieces in one or more flat tensors."""
    wrapper = engine.optimizer
    found: list[list[Part]] = [[] for _ in engine.basic_optimizer.param_groups]
    for index, params in enumerate(wrapper.fp16_groups):
        offset = 0
        for p in params:
            part = _slice(names[id(p)], p, wrapper.fp32_partitioned_groups_flat[index], offset)
            found[wrapper.sub_group_to_group_id[index]].append(part)
            offset += p.partition_numel()
    return found


def frozen(engine: Any) -> list[Part]:
    """The parts of all other parameters."""
    stepped = {part.name for group in trained(engine) for part in group}
    rest = [(name, p) for name, p in engine.module.named_parameters() if name not in stepped]
    if engine.zero_optimization_stage() == 3:
        return [_slice(name, p, p.ds_tensor, 0) for name, p in rest]
    return [_whole(name, p, p) for name, p in rest]


def _whole(name: str, parameter: Tensor, owner: Tensor) -> Part:
    return Part(name, tuple(parameter.shape), 0, parameter.numel(), owner, 0, everywhere=True)


def _slice(name: str, parameter: Any, owner: Tensor, offset: int) -> Part:
    size, numel = parameter.partition_numel(), parameter.ds_numel
    start = min(torch.distributed.get_rank() * size, numel)
    return Part(name, tuple(parameter.ds_shape), start, min(size, numel - start), owner, offset, everywhere=False)


@contextmanager
def rewriting(engine: Any) -> Iterator[None]:
    """Around writes to parts: afterwards the model's own weights follow the masters. Collective."""
    stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        wrapper.checkpoint_event_prologue()  # small parameters stay gathered between steps: let go of the old values
    with torch.no_grad():
        yield
        if stage == 3:
            for index in range(len(wrapper.fp16_groups)):
                wrapper._reassign_or_swap_out_partitioned_parameters(index)
            for parameter in engine.module.parameters():
                parameter.ds_secondary_tensor = None  # of the frozen ones too, which DeepSpeed thinks never change
            wrapper.checkpoint_event_epilogue()
        elif stage:
            wrapper.update_lp_params()
        elif wrapper is not engine.basic_optimizer:
            for weights, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                for weight, master in zip(weights, masters, strict=True):
                    weight.copy_(master)


@torch.no_grad()
def fill(parameter: Any, read: Callable[[int, int], Tensor]) -> None:
    """Write this rank's part of a parameter that ZeRO-3 has in parts: ``read(start, count)`` of the flattened whole."""
    part = _slice("", parameter, parameter.ds_tensor, 0)
    if part.count:
        part.view(parameter.ds_tensor).copy_(read(part.start, part.count))
    parameter.ds_secondary_tensor = None


_SLICE = 2**24  # bytes of a parameter that ranks send each other at a time


@torch.no_grad()
def gather(parameter: Any, place: Tensor | None) -> None:
    """Copy a parameter that ZeRO-3 has in parts into `place` on the CPU, or, with None, into nothing. Collective.

    DeepSpeed gathers it whole on every rank, in as much memory again for gloo's own copy; here a slice of it is sent at
    a time. It is given as it lies in the parts, also where the engine sends quantised weights.
    """
    part: Tensor = parameter.ds_tensor.detach().reshape(-1)  # (n,), padded
    ranks = torch.distributed.get_world_size()
    size = max(1, _SLICE // (ranks * part.element_size()))
    device = torch.cuda.current_device() if torch.distributed.get_backend() == "nccl" else "cpu"
    for first in range(0, len(part), size):
        mine = part[first : first + size].to(device)
        slices = mine.new_empty(ranks * len(mine))
        torch.distributed.all_gather_into_tensor(slices, mine)
        if place is None:
            continue
        for rank, found in enumerate(slices.view(ranks, -1)):
            target = place.view(-1)[rank * len(part) + first :][: len(mine)]  # shorter where the rest is padding
            target.copy_(found[: len(target)])


_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that steps, under DeepSpeed's wrapper. Its groups hold the owners of `trained`'s parts."""
    found: torch.optim.Optimizer = engine.basic_optimizer
    return found


def counters(engine: Any) -> dict[str, int]:
    """The steps and samples so far, and the steps that changed nothing."""
    return {name: int(getattr(engine, name)) for name in _COUNTERS}


def set_counters(engine: Any, values: dict[str, int]) -> None:
    for name, value in values.items():
        setattr(engine, name, value)
    # Not as saved: another number of ranks accumulates over another number of micro-batches.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def _scaler(engine: Any) -> Any:
    """The object with float16's dynamic loss scale, or None where the scale never changes."""
    found = getattr(engine.optimizer, "loss_scaler", None)  # under ZeRO
    if found is not None:
        return found if found.dynamic else None
    found = getattr(engine.optimizer, "loss_scale_config", None)  # stage 0
    return found if found is not None and found.dynamic_loss_scale else None


def scale(engine: Any) -> dict[str, float]:
    """float16's dynamic loss scale and what decides its next change; empty where it never changes."""
    scaler = _scaler(engine)
    return {name: getattr(scaler, name) for name in _SCALE if hasattr(scaler, name)}


def set_scale(engine: Any, values: dict[str, float]) -> None:
    scaler = _scaler(engine)
    for name, value in values.items():
        if scaler is not None and hasattr(scaler, name):
            setattr(scaler, name, value)


def coalesces(engine: Any) -> bool:
    """Whether `engine.coalesce_grad_reduction` can be used: it adds up gradients in the model's own dtype."""
    model_dtype, gradient_dtype = engine.get_data_types()
    return model_dtype == gradient_dtype and hasattr(engine.optimizer, "_coalesce_grad_reduction")


def drop_gradients(module: nn.Module) -> None:
    """Forget what backward passes have left, so that there is nothing to reduce."""
    for parameter in module.parameters():
        parameter.grad = parameter.grad_accum = None  # type: ignore[attr-defined]


def clamp(parameter: nn.Parameter, low: float, high: float) -> None:
    """Bound what the model computes with, on this rank."""
    parameter.data.clamp_(low, high)  # under ZeRO-3 empty, or what is gathered of it
    if hasattr(parameter, "ds_tensor"):
        parameter.ds_tensor.clamp_(low, high)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether this rank holds a part of a parameter only, as ZeRO-3 makes it."""
    return hasattr(tensor, "ds_id")


def numel(parameter: Tensor) -> int:
    """Elements of the whole parameter: ZeRO-3 leaves an empty tensor behind."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def own_numel(parameter: Any) -> int:
    """Elements of a parameter that this rank holds."""
    return int(parameter.ds_tensor.numel() if is_partitioned(parameter) else parameter.numel())


def shape(parameter: Tensor) -> tuple[int, ...]:
    """Of a parameter as a whole, which ZeRO-3 may have in parts."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def plain_linear() -> Iterator[None]:
    """torch's own linear in here: ZeRO-3 gives the whole process another, which rounds otherwise."""
    replaced = nn.functional.linear
    nn.functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        nn.functional.linear = replaced


def skip_shared_memory_op() -> None:
    """Before a process group starts: keep DeepSpeed from compiling, for minutes, an op for inference on CPUs."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
