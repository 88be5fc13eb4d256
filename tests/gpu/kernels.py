"""Each attention kernel against SDPA, and SDPA against attention that is written out: encoder and LLM, by packing.

A kernel may be as far from float32 as the one it is held against, twice, and one rounding more: so flash-attn tests
itself.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models.attention import HUB, Attention, choose
from mser_dist.models.packed import Packing, batch_of
from mser_dist.models.speech import build_speech
from mser_dist.models.speech_llm import SpeechLLM
from tests.gpu.registry import Check, Outcome, Result
from tests.packed_llms import SAMPLES, SIZES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Heads of 64, which every kernel has; grouped ones, and a window that is shorter than a sample.
WIDE: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
ARCH = {"d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 256, "num_mel_bins": 80}
FRAMES = 120
LENGTHS = (120, 97, 55, 120, 31, 78)


def model_of(kind: str) -> SpeechLLM:
    """A Llama, or a Mistral whose window is 5 tokens, behind a small Whisper encoder; on the CPU in float32."""
    torch.manual_seed(0)
    qformer = cfg.QFormerConfig(queries=2, layers=1, width=64, heads=2, dropout=0.0)
    speech = build_speech(cfg.EncoderConfig(arch={**ARCH, "dropout": 0.0}), qformer, Attention("sdpa", "a check"))
    llm = (
        LlamaForCausalLM(LlamaConfig(**SIZES | WIDE))
        if kind == "llama"
        else MistralForCausalLM(MistralConfig(**SIZES | WIDE, sliding_window=5))
    )
    return SpeechLLM(speech, llm)


def batch(packing: Packing, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Six samples whose clips differ in length."""
    made = batch_of(SAMPLES, packing)
    draw = torch.Generator().manual_seed(1)
    made |= {
        "speech": torch.randn(len(SAMPLES), 80, FRAMES, generator=draw).to(dtype),
        "lengths": torch.tensor(LENGTHS),
    }
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}
    return {**moved, "normalizer": float(len(SAMPLES))}


def flat(model: nn.Module, value: Tensor) -> Tensor:
    """What a pass gave and the gradients that it left, as one vector in double precision on the CPU."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    whole = torch.cat([each.detach().double().cpu().flatten() for each in (value, *grads)])
    model.zero_grad()
    return whole


def encoded(model: SpeechLLM, kernel: str, device: str, dtype: torch.dtype) -> Tensor:
    """The features of clips in a padded batch, and the encoder's gradients."""
    encoder: Any = model.speech.any_encoder
    encoder.whisper.set_attn_implementation(kernel)
    given = batch("off", device, dtype)
    features, mask = encoder(given["speech"], given["lengths"])
    own = features[mask]
    own.float().square().mean().backward()
    return flat(encoder, own)


def answered(model: SpeechLLM, kernel: str, packing: Packing, device: str, dtype: torch.dtype) -> Tensor:
    """The loss of a batch, and all gradients; the encoder hears by SDPA."""
    encoder: Any = model.speech.any_encoder
    encoder.whisper.set_attn_implementation("sdpa")
    model.llm.set_attn_implementation(kernel)
    loss, _ = model(batch(packing, device, dtype))
    loss.backward()
    return flat(model, loss)


def compare(kernel: str, device: str, folder: Path) -> Result:
    """By place and dtype: how far from float32 the kernel is, and the plain one that it is held against."""
    plain = "eager" if kernel == "sdpa" else "sdpa"
    packings: tuple[Packing, ...] = ("off", "rows", "prefix") if kernel == "sdpa" else ("off", "rows")
    try:
        reason = choose("auto" if kernel == "sdpa" else kernel, torch.bfloat16, device).reason
    except UserError as error:
        if kernel not in HUB:  # whose package is here, so that it has to run
            raise
        return {"skipped": str(error)}  # not in the hub's cache, and no network
    apart = {}
    dtypes = DTYPES if device == "cuda" else {"bfloat16": torch.bfloat16}  # float16 is slow on a CPU
    for kind in ("llama", "mistral"):
        whole = model_of(kind).to(device)
        works: dict[str, Callable[..., Tensor]] = {
            f"{kind} {packing}": partial(answered, packing=packing) for packing in packings
        }
        works |= {"encoder": encoded} if kind == "llama" else {}
        for name, work in works.items():
            exact = work(whole, "eager", device=device, dtype=torch.float32)
            for said, dtype in dtypes.items():
                half = copy.deepcopy(whole).to(dtype)
                distances = [work(half, one, device=device, dtype=dtype) for one in (kernel, plain)]
                there, other = (float((one - exact).norm() / exact.norm()) for one in distances)
                apart[f"{name} {said}"] = [there, other, torch.finfo(dtype).eps]
    return {"apart": apart, "kernel": kernel, "plain": plain, "reason": reason}


def judge(results: list[Result]) -> Outcome:
    [result] = results
    wrong = [name for name, (one, other, eps) in result["apart"].items() if not one <= 2 * other + eps]
    name, (one, other, _) = max(result["apart"].items(), key=lambda item: item[1][0] / max(item[1][1], 1e-12))
    line = f"{result['kernel']} at worst {one:.1e} from float32 where {result['plain']} is {other:.1e} ({name})"
    more = f"; too far in: {', '.join(wrong)}" if wrong else f", {len(result['apart'])} cases; {result['reason']}"
    return Outcome(not wrong, {"from_float32": one, "plain": other}, line + more)


def _check(kernel: str, module: str, capability: tuple[int, int], cpu: bool, **more: Any) -> Check:
    title = f"attention {kernel.removeprefix('kernels-community/')}" + (" (hub)" if kernel in HUB else "")
    against = "attention that is written out" if kernel == "sdpa" else "SDPA"
    what = f"encoder and LLM, padded and packed, against {against}"
    work = partial(compare, kernel)
    return Check(title, what, work, judge, cpu, single=True, module=module, capability=capability, **more)


# The calls of flash-attn, by a function written out.
TESTS = "tests/unit/test_packed.py"
CHECKS = [
    _check("sdpa", "", (0, 0), True),
    _check("flash_attention_2", "flash_attn", (8, 0), False, tests=TESTS),
    _check("flash_attention_3", "flash_attn_interface", (9, 0), False, only_major=True, tests=TESTS),
    *(
        _check(kernel, module, (low, 0), False, only_major=low == high, tests=TESTS)
        for kernel, (module, low, high) in HUB.items()
    ),
]
