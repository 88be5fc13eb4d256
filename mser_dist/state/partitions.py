"""Where DeepSpeed keeps the training state on this rank, for ZeRO stages 0 to 3: all that reads its inner attributes.

Its public `safe_get_…`/`safe_set_…` functions are not enough: they move offloaded state to the GPU, work only after the
first step, and stages 1 and 2 have no local ones. Read with DeepSpeed 0.19.8.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mser_dist.errors import UserError

# Settings under which state lives where `trained` and `frozen` do not look: "is this value one of them?"
_REFUSED: dict[str, Callable[[Any], bool]] = {
    "zero_optimization.offload_optimizer.device": lambda value: value == "nvme",
    "zero_optimization.offload_param.device": lambda value: value == "nvme",
    "zero_optimization.offload_optimizer.ratio": lambda value: value != 1,  # the rest is in a second optimizer
    "zero_optimization.offload_optimizer.super_offload": bool,
    "zero_optimization.zenflow": bool,
    # DeepSpeed's map from parameters to partitions leaves the reordering out.
    "zero_optimization.round_robin_gradients": bool,
    "zero_optimization.zero_quantized_nontrainable_weights": bool,
    # Anything but float32 masters and moments.
    "bf16.bf16_master_weights_and_grads": bool,
    "bf16.bf16_optimizer_states": bool,
    "fp16.fp16_master_weights_and_grads": bool,
    "torch_autocast.enabled": bool,  # its gradient scaler has a state of its own
    "tensor_parallel.autotp_size": lambda value: value not in (0, 1),
}


def check_supported(ds_json: dict[str, Any]) -> None:
    """Raise `UserError` if a DeepSpeed config asks for state that no checkpoint of this project would hold."""
    for setting, refused in _REFUSED.items():
        value: Any = ds_json
        for key in setting.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and refused(value):
            instead = "set it to cpu" if value == "nvme" else "remove it"
            raise UserError(f"the DeepSpeed JSON's {setting}={value} cannot be saved in a checkpoint: {instead}")


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


def loss_scaler(engine: Any) -> Any:
    """The object with float16's dynamic loss scale, or None where the scale never changes."""
    found = getattr(engine.optimizer, "loss_scaler", None)  # under ZeRO
    if found is not None:
        return found if found.dynamic else None
    found = getattr(engine.optimizer, "loss_scale_config", None)  # stage 0
    return found if found is not None and found.dynamic_loss_scale else None
