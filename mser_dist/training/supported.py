"""Which DeepSpeed settings a training refuses: those under which state lives where no checkpoint looks for it."""

from collections.abc import Callable
from typing import Any

from mser_dist.errors import UserError

# Those under which state lives where `deepspeed_parts.trained` does not look: "is this value one of them?"
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
