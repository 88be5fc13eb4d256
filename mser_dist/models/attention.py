"""Which attention kernel runs, and why.

``auto`` takes flash-attn when the package, the GPU and the dtype allow it, else PyTorch's SDPA, whose own flash kernels
need no package. Asking by name for a kernel that cannot run is an error that names the missing thing. The kernels of
the Hugging Face hub are compiled code that the `kernels` package fetches and runs: they are taken by name alone.
"""

import importlib.util
from dataclasses import dataclass

import torch

from mser_dist.errors import UserError

# Module, and lowest and highest major compute capability of each kernel (flash-attn's README: 2 from Ampere on, 3 is a
# build for Hopper alone).
_FLASH = {"flash_attention_3": ("flash_attn_interface", 9, 9), "flash_attention_2": ("flash_attn", 8, 99)}
HUB = {"kernels-community/vllm-flash-attn3": ("kernels", 9, 9), "kernels-community/flash-attn2": ("kernels", 8, 99)}
_EXTRA = {
    "flash_attn": "`pip install 'mser-dist[flash-attn]'`",
    "flash_attn_interface": "flash-attention 3's hopper build",
    "kernels": "`pip install kernels`",
}


@dataclass(frozen=True)
class Attention:
    """A kernel in transformers' spelling (`attn_implementation`) and the reason for it."""

    kernel: str
    reason: str
    named: bool = False  # in the config: then it runs, or is an error


def choose(requested: str, dtype: torch.dtype, device: str) -> Attention:
    """The kernel for `requested` (auto, or a kernel's name). Raises `UserError` if a named kernel cannot run."""
    if requested in ("sdpa", "eager"):
        return Attention(requested, "asked for", named=True)
    if requested in _FLASH | HUB:
        missing = _missing(requested, dtype, device) or _unfetched(requested)
        if missing:
            raise UserError(f"the attention kernel {requested} cannot run: {missing}; or set attention to auto")
        return Attention(requested, "asked for", named=True)
    if requested != "auto":
        raise ValueError(f"unknown attention kernel {requested!r}")
    reasons = []
    for kernel in _FLASH:
        missing = _missing(kernel, dtype, device)
        if not missing:
            return Attention(kernel, "auto: package, GPU and dtype allow it")
        reasons.append(f"{kernel}: {missing}")
    if importlib.util.find_spec("kernels") is not None:
        reasons += [f"{kernel}: {_missing(kernel, dtype, device) or 'by name alone'}" for kernel in HUB]
    return Attention("sdpa", "auto: " + "; ".join(dict.fromkeys(reasons)))


def _missing(kernel: str, dtype: torch.dtype, device: str) -> str:
    """What keeps a flash kernel from running here; empty if nothing does."""
    module, lowest, highest = (_FLASH | HUB)[kernel]
    if device != "cuda":
        return "it needs a CUDA GPU and there is none"
    if importlib.util.find_spec(module) is None:
        return f"the Python module {module} is not installed ({_EXTRA[module]})"
    major, minor = torch.cuda.get_device_capability()
    if not lowest <= major <= highest:
        needed = f"{lowest}.x" if lowest == highest else f"{lowest}.0 or more"
        return f"it needs a GPU of compute capability {needed}, this one has {major}.{minor}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    return ""


def _unfetched(kernel: str) -> str:
    """Why a kernel of the hub cannot be loaded; empty if it is here now, or is none of the hub's."""
    if kernel not in HUB:
        return ""
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    try:
        lazy_import_flash_attention(kernel)
    except Exception as error:  # no network, no build for this torch, another version of `kernels`: each its own
        return f"the hub's {kernel} cannot be loaded ({' '.join(str(error).split())[:160]})"
    return ""


def supported_by(model_class: type, attention: Attention) -> Attention:
    """`attention`, or what a model's transformers class can run instead: the Q-Former has no flash-attn path, and
    WavLM, whose position bias depends on the queries, has its own attention alone.
    """
    name = model_class.__name__
    if attention.kernel != "eager" and not getattr(model_class, "_supports_sdpa", True):
        return Attention("eager", f"{name} has no other attention in transformers")
    if attention.kernel in _FLASH | HUB and not getattr(model_class, "_supports_flash_attn", False):
        return Attention("sdpa", f"{name} has no flash-attn path in transformers")
    return attention


def for_class(model_class: type, attention: Attention) -> Attention:
    """The kernel of an LLM's class: what ``auto`` chose, or what the class can run instead; a named one is an error."""
    able = supported_by(model_class, attention)
    if attention.named and able != attention:
        raise UserError(
            f"engine.attention={attention.kernel}: {able.reason}: set engine.attention={able.kernel}, or auto"
        )
    return able
