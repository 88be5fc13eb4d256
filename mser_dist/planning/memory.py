"""What a rank keeps for the backward pass, by part, counted on tensors without storage."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mser_dist import config as cfg
from mser_dist.models.llm import base_of
from mser_dist.models.packed import Packing, batch_of
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.planning import shapes
from mser_dist.planning.rehearsal import samples

USABLE = 0.92  # of a GPU's memory: the rest is CUDA's context, NCCL's buffers and what lies between blocks


@dataclass(frozen=True)
class Activations:
    """Bytes that are kept for the backward pass of a micro-batch: of aligner (and a trained encoder), LLM and logits.

    layers, inputs: of the LLM, what of it gradient checkpointing keeps (each layer's input). cache: features.
    """

    aligner: float
    llm: float
    logits: float
    layers: int
    inputs: float
    cache: float

    def times(self, factor: float) -> "Activations":
        """Of a micro-batch that is larger by so much."""
        scaled = {name: getattr(self, name) * factor for name in ("aligner", "llm", "logits", "inputs", "cache")}
        return replace(self, **scaled)

    def of_llm(self, checkpointing: bool) -> float:
        """With checkpointing the inputs of all layers, and what one of them keeps while it is computed again."""
        return self.inputs + self.llm / max(1, self.layers) if checkpointing else self.llm


def activations(
    config: cfg.Stage1 | cfg.Stage2,
    clips: int,
    frames: int,
    instruction: int,
    kinds: int,
    llm_shape: str | None,
    stage1: str | None,
) -> Activations:
    """Of a forward pass on tensors without storage, in the engine's dtype: what autograd keeps, parameters apart.

    Attention by torch's fused kernel, which keeps no scores. Without gradient checkpointing, see `Activations.of_llm`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mser_dist.planning.collectives import Log

    dtype = getattr(torch, config.engine.dtype)
    plain = config
    if isinstance(config, cfg.Stage2):
        plain = replace(config, llm=replace(config.llm, gradient_checkpointing=False))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = shapes.build(plain, llm_shape, stage1)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    made = _batch(model, clips, frames, instruction, kinds, config)
    with fake:
        made["speech"] = torch.zeros(made.pop("shape"), dtype=dtype)
    cache = made["speech"].nbytes if model.speech.frozen is not None else 0
    kept = _Kept(model)
    with fake, Log(pretending=True), kept:
        if not isinstance(model, SpeechLLM):
            model({**made, "text": torch.zeros(clips, model.text_head.in_features, dtype=dtype)})
            return Activations(kept.bytes["aligner"], 0, 0, 0, 0, cache)
        with kept.while_in(model.llm, "llm"), kept.while_in(base_of(model.llm).get_output_embeddings(), "logits"):
            loss, _ = model({**made, "normalizer": 1.0})
        del loss
    text = model.llm_config.get_text_config()
    tokens = made["input_ids"].numel()
    inputs = text.num_hidden_layers * tokens * text.hidden_size * torch.empty((), dtype=dtype).itemsize
    answers = len(made["at"]) * len(made["input_ids"]) * text.vocab_size
    logits = kept.bytes["logits"] + answers * 8  # in float32, and their softmax: behind the head
    return Activations(kept.bytes["aligner"], kept.bytes["llm"], logits, text.num_hidden_layers, inputs, cache)


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of what autograd keeps, each storage once, by the part that is being computed."""

    def __init__(self, model: nn.Module) -> None:
        # The storages are held: one that is freed would give its id to another.
        self._storages: dict[int, Any] = {id(s): s for s in (p.untyped_storage() for p in model.parameters())}
        self._part = "aligner"
        self.bytes = {"aligner": 0.0, "llm": 0.0, "logits": 0.0}
        super().__init__(self._pack, lambda kept: kept)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._storages:
            self._storages[id(storage)] = storage
            self.bytes[self._part] += storage.nbytes()
        return tensor

    @contextmanager
    def while_in(self, module: nn.Module, part: str) -> Iterator[None]:
        before: list[str] = []

        def enter(*_: Any) -> None:
            before.append(self._part)
            self._part = part

        def leave(*_: Any) -> None:
            self._part = before.pop()

        handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _batch(
    model: Any, clips: int, frames: int, instruction: int, kinds: int, config: cfg.Stage1 | cfg.Stage2
) -> dict[str, Any]:
    """A micro-batch but for the speech, of which the shape. frames: of 20 ms, of each clip."""
    speech = model.speech
    encoder = speech.any_encoder
    if speech.frozen is not None:
        size = -(-frames // encoder.stride)
        shape: tuple[int, ...] = (clips, size, len(speech.layers), encoder.width)
    else:
        n_mels = encoder.features.n_mels
        size = int(encoder.fed(torch.tensor([frames * (2 if n_mels else 320)]))[0])
        shape = (clips, n_mels, size) if n_mels else (clips, size)
    made: dict[str, Any] = {"lengths": torch.full((clips,), size), "shape": shape}
    if isinstance(config, cfg.Stage2):
        packing: Packing = config.llm.packing
        made |= batch_of(samples(speech.query_count, clips, instruction, kinds), packing)
    return made
