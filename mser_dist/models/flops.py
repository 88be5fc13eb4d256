"""Floating-point operations of a step, counted from shapes: those that its clips need, and those that are computed.

Counted are the products of matrices, convolutions among them, at two a multiplication and addition, as
`torch.utils.flop_counter` does, which a test holds this against. Left out are norms, activations, the contrastive
scores, and what gathers or updates weights. A backward pass is a product for the gradient of a layer's weight, where
that is trained, and one for its input, where something before it is. Attention is counted as it is computed without a
causal kernel: all queries by all keys of a row; those that are needed are the pairs that a mask lets see each other.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from mser_dist import deepspeed_parts
from mser_dist.models import attention
from mser_dist.models.aligner import Aligner
from mser_dist.models.encoder import Encoder
from mser_dist.models.encoders import encoder_config
from mser_dist.models.llm import base_of
from mser_dist.models.packed import IGNORE
from mser_dist.models.speech import SpeechModel
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.models.waveform import WaveformEncoder

# Kernels that compute the scores anew in a backward pass.
_FUSED = ("sdpa", "flash_attention_2", "flash_attention_3", *attention.HUB)


@dataclass(frozen=True)
class Flops:
    """model: of the clips themselves, what MFU counts. hardware: of all that is computed, padding and what is
    computed again among it, what HFU counts.
    """

    model: float = 0.0
    hardware: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.model + other.model, self.hardware + other.hardware)


class Work(NamedTuple):
    """What an LLM is given in a forward pass.

    tokens: that go through its layers. pairs: of a query and a key in each layer's attention. answers: places with
    logits.
    """

    tokens: float
    pairs: float
    answers: float


def work_of(batch: dict[str, Any], flash: bool) -> tuple[Work, Work]:
    """What the clips of a batch (`packed.batch_of`) ask of an LLM, and what it computes.

    A token sees those before it in its sample: as many as its position says. flash: packed rows are kept apart by a
    kernel that computes each by itself, else by a mask.
    """
    rows, width = batch["input_ids"].shape
    if "attention_mask" in batch:
        own = batch["attention_mask"].sum(1).double()
        tokens, seen = float(own.sum()), float((own * (own + 1) / 2).sum())
    else:
        tokens, seen = float(width), float((batch["position_ids"] + 1).sum())
    pairs = float(rows * width**2)
    if flash and "ends" in batch:
        pairs = float((batch["ends"].diff().double() ** 2).sum())
    answers = float((batch["labels"][:, 1:] != IGNORE).sum())
    return Work(tokens, seen, answers), Work(float(rows * width), pairs, float(rows * len(batch["at"])))


class Heard(NamedTuple):
    """What a speech model is given in a forward pass.

    lengths: (B,) frames or samples of the clips, or frames of features that a frozen encoder has made. encoded: they
    are features. again: the forward pass is computed twice (gradient caching).
    """

    lengths: Tensor
    encoded: bool
    again: bool = False


class _Cost(NamedTuple):
    """Operations of one token, or pair, in a forward and in a backward pass; again: of those that are recomputed."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0

    def plus(self, other: "_Cost", times: float = 1.0) -> "_Cost":
        return _Cost(*(mine + times * its for mine, its in zip(self, other, strict=True)))

    def flops(self, needed: float, computed: float) -> Flops:
        return Flops(needed * (self.forward + self.backward), computed * sum(self))


def _weights(module: nn.Module) -> tuple[float, bool] | None:
    """Multiplications that a linear layer makes of a token, and whether it is trained."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features, module.weight.requires_grad
    if isinstance(module, Conv1D):  # GPT-2's linear layer
        return module.nx * module.nf, module.weight.requires_grad
    return None


def _linear(modules: Iterable[nn.Module], flows: bool) -> tuple[_Cost, bool]:
    """The linear layers among modules in the order of their computation; whether gradients flow into what follows.

    flows: whether they do into the first of them.
    """
    total = _Cost()
    for module in modules:
        if found := _weights(module):
            size, trained = found
            total = total.plus(_Cost(2 * size, 2 * size * (flows + trained)))
        flows = flows or any(p.requires_grad for p in module.parameters(recurse=False))
    return total, flows


def _attention(width: float, flows: bool, kernel: str | None) -> _Cost:
    """Of a pair of query and key: scores and what is made of them; four products back, and five in a fused kernel."""
    return _Cost(4 * width, 8 * width * flows, 2 * width * (flows and kernel in _FUSED))


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


class SpeechCount:
    """Counts the passes of a speech model, by what of it is frozen now."""

    def __init__(self, model: SpeechModel) -> None:
        self._model = model
        config, queries = model.qformer.config, model.query_count
        # Behind a trained encoder, or a trained mix of layers, the features have a gradient.
        heard = model.encoder is not None and _trained(model.encoder)
        mixed = model.layer_mix is not None and model.layer_mix.requires_grad
        trained = _trained(model.qformer) or model.queries.requires_grad
        self.flows = heard or mixed or trained  # gradients, into what follows
        across = {
            name: module
            for name, module in model.qformer.named_modules()
            if "crossattention" in name and name.endswith((".key", ".value"))
        }
        others = [m for name, m in model.qformer.named_modules() if name not in across and not _WORDS.search(name)]
        self._query, _ = _linear(others, self.flows)
        self._frame = _Cost()
        for layer in across.values():  # all of them look at the same frames
            self._frame = self._frame.plus(_linear([layer], heard or mixed)[0])
        self._pair = _attention(config.hidden_size, self.flows, config._attn_implementation)
        self._queries = queries
        self._pairs = config.num_hidden_layers * queries**2, len(across) // 2 * queries  # a clip, and a frame
        self._pool = _Cost()
        if model.pool is not None:
            self._pool, _ = _linear([model.pool], heard or mixed)
            self.flows = self.flows or _trained(model.pool)
        if model.layer_mix is not None:
            mix = 2.0 * len(model.layers) * model.any_encoder.width
            self._frame = self._frame.plus(_Cost(mix, mix * (mixed + heard)))

    def __call__(self, heard: Heard) -> tuple[Flops, float, float]:
        """Of a forward and a backward pass; then the frames that the Q-Former needs, and those that it computes."""
        flops, clips, frames = Flops(), len(heard.lengths), heard.lengths
        if not heard.encoded:
            encoder = self._model.any_encoder
            frames = -(-encoder.frames(heard.lengths) // encoder.stride)
            fed = encoder.fed(heard.lengths)
            needed = computed = _encoder(encoder, fed)
            if self._model.frozen is None:  # which hears one clip at a time
                computed = _encoder(encoder, torch.full_like(fed, int(fed.max())))
            computed = computed._replace(again=computed.again + computed.forward * heard.again)
            flops += Flops(needed.forward + needed.backward, sum(computed))
        own, padded = float(frames.sum()), float(clips * frames.max())
        a_clip, a_frame = self._pairs
        for cost, needed_of, computed_of in (
            (self._query, clips * self._queries, clips * self._queries),
            (self._pair, clips * a_clip + own * a_frame, clips * a_clip + padded * a_frame),
            (self._frame, own, padded),
            (self._pool, clips, clips),
        ):
            flops += cost._replace(again=cost.again + cost.forward * heard.again).flops(needed_of, computed_of)
        return flops, own, padded


_WORDS = re.compile(r"(?<!attention)\.(intermediate|output)\.dense$")  # BLIP-2's, for words beside the queries


def _encoder(encoder: Encoder, fed: Tensor) -> _Cost:
    """Of the clips together, (n,) frames or samples each, which are computed at these lengths."""
    total, length = _Cost(), fed
    flows = isinstance(encoder, WaveformEncoder) and _trained(encoder)  # transformers asks for that of the waveform too
    tokens = float(encoder.frames(fed).sum())
    for module in encoder.modules():
        if isinstance(module, nn.Conv1d):
            padding = module.padding[0] if isinstance(module.padding, tuple) else 0
            made = (length + 2 * padding - module.kernel_size[0]) // module.stride[0] + 1
            filters = module.in_channels // module.groups * module.kernel_size[0] * module.out_channels
            size = 2.0 * filters * float(made.sum())
            total = total.plus(_Cost(size, size * (flows + _trained(module))))
            length = made
            flows = flows or _trained(module)
        else:
            cost, flows = _linear([module], flows)
            total = total.plus(cost, tokens)
    pairs = float((encoder.frames(fed).double() ** 2).sum()) * max(encoder.layers)
    return total.plus(_attention(encoder.width, flows, encoder_config(encoder)._attn_implementation), pairs)


class LLMCount:
    """Counts the passes of an LLM, by what of it is frozen now; flows: gradients do into its inputs."""

    def __init__(self, llm: Any, flows: bool) -> None:
        base = base_of(llm)
        text, head = base.config.get_text_config(), base.get_output_embeddings()
        modules = [module for module in base.modules() if module is not head]
        cost, flows = _linear(modules, flows)
        for module in modules:
            if type(module).__name__.endswith("Experts"):
                cost = cost.plus(_experts(module, text, flows))
        kinds = getattr(text, "layer_types", None) or ["attention"] * text.num_hidden_layers
        layers = sum("attention" in kind for kind in kinds)
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        kernel = base.config._attn_implementation
        pair = _Cost().plus(_attention(text.num_attention_heads * head_width, flows, kernel), layers)
        if _checkpoints(base) and flows:
            cost = cost._replace(again=cost.forward - _last(base))
            pair = pair._replace(again=pair.again + pair.forward)
        self._token, self._pair, self._answer = cost, pair, _linear([head], flows)[0]

    def __call__(self, needed: Work, computed: Work) -> Flops:
        """Of a forward and a backward pass."""
        flops = Flops()
        for cost, mine, its in zip((self._token, self._pair, self._answer), needed, computed, strict=True):
            flops += cost.flops(mine, its)
        return flops


def _experts(module: nn.Module, config: Any, flows: bool) -> _Cost:
    """Of a token, which goes through a few of a layer's experts; their weights are one parameter, (experts, …)."""
    weights = [p for p in module.parameters(recurse=False) if len(deepspeed_parts.shape(p)) == 3]
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    size = 2.0 * sum(map(deepspeed_parts.numel, weights)) * getattr(config, "num_experts_per_tok", experts) / experts
    return _Cost(size, size * (flows + any(p.requires_grad for p in weights)))


def _checkpoints(llm: nn.Module) -> bool:
    layers = [module for module in llm.modules() if isinstance(module, GradientCheckpointingLayer)]
    return any(layer.gradient_checkpointing for layer in layers)


def _last(llm: nn.Module) -> float:
    """Operations of a token that gradient checkpointing leaves out: it stops at the last product of a layer, whose
    result is needed by a norm behind it alone.
    """
    left = 0.0
    for layer in llm.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            names = [name for name, _ in layer.named_modules()]
            sizes = [found[0] for module in layer.modules() if (found := _weights(module))]
            left += 0.0 if any(name.startswith("post_feedforward") for name in names) else 2 * sizes[-1]
    return left


class Load(NamedTuple):
    """Of a forward and a backward pass: its operations, and the tokens that the clips have, and that are computed.

    Tokens of the LLM in stage 2; in stage 1 frames that the Q-Former looks at.
    """

    flops: Flops
    tokens: float
    computed: float


class StepCount:
    """Counts the passes of a stage's model, by what of it is frozen now: a backward pass to what is trained."""

    def __init__(self, model: Aligner | SpeechLLM) -> None:
        self._speech = SpeechCount(model.speech)
        self._llm: LLMCount | None = None
        if isinstance(model, SpeechLLM):
            self._per_clip = model.speech.query_count
            self._behind, flows = _linear(model.projector.modules(), self._speech.flows)
            self._llm = LLMCount(model.llm, flows)
        else:
            self._per_clip = 1
            head, _ = _linear([model.speech_head], self._speech.flows)
            self._behind = head.plus(_linear([model.text_head], False)[0])

    def __call__(self, heard: Heard, needed: Work | None = None, computed: Work | None = None) -> Load:
        """Of a micro-batch; needed, computed: what its LLM is given, if there is one."""
        flops, *tokens = self._speech(heard)
        clips = len(heard.lengths) * self._per_clip
        flops += self._behind._replace(again=self._behind.forward * heard.again).flops(clips, clips)
        if self._llm is None or needed is None or computed is None:
            return Load(flops, *tokens)
        return Load(flops + self._llm(needed, computed), needed.tokens, computed.tokens)
