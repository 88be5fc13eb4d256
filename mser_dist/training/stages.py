"""What differs between the two stages.

Each has `model`; `features`, what its encoder is fed; `collate`, which makes a batch of clips in a worker; `check`, of
the model before the first step; `step`, one optimizer step over its micro-batches; `scorer`, which scores the labels of
a batch for validation; `card`, what the exported model is; `loads`, what its micro-batches cost; `bases`, where weights
come from that every start loads (and `began_with`, what these were where a run's adapters were trained); and `source`,
the card of the run that this one builds on, if any.
"""

from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mser_dist import config as cfg
from mser_dist.contrastive import Embedded, cached_backward, peak_bytes
from mser_dist.errors import UserError
from mser_dist.evaluation.scoring import AnswerScorer, PromptScorer
from mser_dist.models import bases, exported, initial, prompts, sources
from mser_dist.models.aligner import Aligner
from mser_dist.models.attention import Attention
from mser_dist.models.bases import Base
from mser_dist.models.flops import Heard, Load, StepCount, work_of
from mser_dist.models.lora import adapted
from mser_dist.models.packed import IGNORE, is_flash
from mser_dist.models.self_check import Checked, check_llm, check_speech
from mser_dist.models.speech import build_speech
from mser_dist.models.text import TextTower
from mser_dist.ranks import distributed
from mser_dist.training.class_weights import class_weights
from mser_dist.training.collate import AlignCollate, Batch, InstructCollate, kept_captions, kept_prompt, numbered
from mser_dist.training.engine import Engine
from mser_dist.training.nonfinite import poison

Stats = dict[str, Tensor]  # telemetry of a step, still on the device


class Align:
    """Stage 1: contrastive alignment with the captions of each clip's label."""

    def __init__(self, config: cfg.Stage1, attention: Attention, device: str) -> None:
        self.config = config
        self.device = device
        self.labels = config.data.labels
        self.tower = TextTower(config.text.pretrained, device)
        self.source: dict[str, Any] | None = None
        if config.init_from:
            export = exported.find(config.init_from, 1, "init_from")
            self.source = exported.read_card(export)
            _same_shape(config, self.source["speech"])
            speech = exported.load_speech(export, attention)
            if config.encoder.freeze:
                speech.freeze_encoder()
        else:
            dtype = getattr(torch, config.engine.dtype)
            speech = build_speech(config.encoder, config.qformer, attention, dtype)
        self.model = Aligner(speech, self.tower.width, config.contrastive)
        self.features = speech.any_encoder.features
        self.bases = self._bases()
        self.began_with: dict[str, Any] = {}
        self.said = kept_captions(Path(config.out), config.text, self.labels)
        self.collate = AlignCollate(self.said)
        texts = [caption for label in self.labels for caption in self.said[label]]
        self.captions = self.tower.embed(texts)  # (C, width)

    def step(self, engine: Engine, batches: list[Batch], done: float) -> tuple[Stats, list[float]]:
        """Contrast all micro-batches of all ranks at once, in the memory of one (gradient caching). Collective.

        done: share of the training that is over. Returns telemetry and the loss.
        """
        config = self.config.contrastive
        alpha = config.alpha * _factor(config.alpha_schedule, done)
        beta = config.beta * _factor(config.beta_schedule, done)
        ids = {n: torch.cat([b[n] for b in batches]).to(self.device) for n in ("label", "source", "caption")}

        def embed(batch: Batch) -> Embedded:
            moved = self.model.speech.prepared(batch, self.device)
            return engine.forward({**moved, "text": self.captions[moved["caption"]]})

        def loss(embedded: Embedded) -> tuple[Tensor, Stats]:
            value, stats = self.model.contrast(embedded, ids, alpha, beta)
            return poison(value), stats

        with engine.one_reduction():
            _, stats = cached_backward(batches, embed, loss, backward=engine.backward, no_sync=engine.no_sync)
        engine.step()
        return stats | self.model.speech.layer_shares(), [float(stats["loss"])]

    @cached_property
    def _count(self) -> StepCount:
        return StepCount(self.model)

    def loads(self, batches: list[Batch]) -> list[Load]:
        """What each micro-batch of a step costs; all but the last are computed forward twice."""
        last = len(batches) - 1
        return [
            self._count(Heard(batch["lengths"], bool(batch.get("encoded")), again=number < last))
            for number, batch in enumerate(batches)
        ]

    def describe(self, world_size: int) -> str:
        """What is contrasted, and the memory that it takes, for the person who starts a run."""
        config, batch = self.config.contrastive, self.config.train.global_batch
        terms = 2 if config.beta else 1
        gather = config.gather
        one = peak_bytes(batch // world_size, config.width, ranks=world_size, gather=gather, tile=config.tile)
        return f"contrasts {batch} clips a step by {config.loss}: about {terms * one / 2**20:.1f} MiB a rank"

    def _bases(self) -> dict[str, Base]:
        """Where weights come from that every start loads, by the beginnings of parameters' names."""
        encoder, init_from = self.config.encoder, self.config.init_from
        if init_from:
            return {"speech.": exported.base_of(exported.find(init_from, 1, "init_from"), "speech.safetensors")}
        if encoder.pretrained and not encoder.allow_missing:
            files = bases.files_of(sources.resolve(encoder.pretrained))
            return {"speech.encoder.": bases.Base(encoder.pretrained, files)}
        return {}

    def weigh(self, counts: list[int]) -> str:
        """Nothing: the contrastive loss is of pairs of clips, whose labels `data.balance` can balance."""
        return ""

    def scorer(self) -> PromptScorer:
        return PromptScorer(self.model, self.tower, self.labels, self.said)

    def check(self) -> str:
        """Raise `UserError` if a clip's tokens depend on its batch. Collective."""
        check_speech(self.model.speech, self.device)
        return ""

    def facts(self) -> dict[str, str]:
        """What the tracker records beside the config."""
        return {}

    def card(self) -> dict[str, Any]:
        said = {"captions": self.said} if self.config.text.captions else {}
        return {"text": self.tower.name, "text_width": self.tower.width, **said, **exported.aligner_card(self.model)}


def _same_shape(config: cfg.Stage1, card: dict[str, Any]) -> None:
    """Raise `UserError` where a config asks for another model than the one that `init_from` brings."""
    qformer, arch = card["qformer"], config.encoder.arch
    if arch:
        arch = {"model_type": "whisper", **arch}
    depth = card["encoder"].get("encoder_layers", card["encoder"].get("num_hidden_layers"))
    layers = card.get("layers", {"numbers": [depth], "depth": depth, "stride": 1})  # before 0.3.0
    wanted_layers = {"last": [layers["depth"]], "all": list(range(layers["depth"] + 1))}.get(
        str(config.encoder.layers), config.encoder.layers
    )
    brought = {
        "encoder.layers": (wanted_layers, layers["numbers"]),
        "encoder.pad_seconds": (config.encoder.pad_seconds, card["features"]["pad_seconds"]),
        "encoder.combine": (config.encoder.combine, "concat" if card.get("concat") else "mix"),
        "encoder.normalize": (config.encoder.normalize, card.get("normalize", "none")),
        "encoder.stride": (config.encoder.stride, layers["stride"]),
        "qformer.pool": (config.qformer.pool, card.get("pool", False)),
        "qformer.queries": (config.qformer.queries, card["queries"]),
        "qformer.layers": (config.qformer.layers, qformer["num_hidden_layers"]),
        "qformer.width": (config.qformer.width, qformer["hidden_size"]),
        "qformer.heads": (config.qformer.heads, qformer["num_attention_heads"]),
        **{f"encoder.arch.{key}": (value, card["encoder"].get(key)) for key, value in arch.items()},
    }
    for key, (wanted, there) in brought.items():
        if wanted != there and not key.endswith("dropout"):
            raise UserError(f"{key}={wanted}, but init_from={config.init_from} brings {there}: set {key}={there}")


def _factor(schedule: list[list[float]], done: float) -> float:
    """The factor of a schedule, linear between its points, when a share of the steps is done; 1 without points."""
    return float(np.interp(done, [share for share, _ in schedule], [f for _, f in schedule])) if schedule else 1.0


class Instruct:
    """Stage 2: the LLM answers an instruction about the clip with its label."""

    def __init__(self, config: cfg.Stage2, attention: Attention, device: str, ds_json: dict[str, Any]) -> None:
        self.config = config
        self.device = device
        self.labels = config.data.labels
        begin = initial.find(config)
        self.source: dict[str, Any] | None = exported.read_card(begin.speech)
        self.model, self.tokenizer, self.base = initial.build(config, begin, attention, ds_json)
        self.bases = initial.bases_of(config, begin)
        self.began_with = initial.trained_on(begin)
        speech, llm = self.model.speech, self.model.llm
        if config.freeze_encoder:
            speech.freeze_encoder()
        elif speech.normalize != "none":
            raise UserError(
                f"freeze_encoder=false, and stage1={config.stage1} has encoder.normalize={speech.normalize}, by "
                "statistics of a frozen encoder's features: set freeze_encoder=true"
            )
        if config.freeze_qformer:
            speech.qformer.requires_grad_(False)
            speech.queries.requires_grad_(False)
        self.features = speech.any_encoder.features
        self.prompt = kept_prompt(Path(config.out), config.llm, self.tokenizer, self.labels)
        self.collate = InstructCollate(
            self.tokenizer, self.prompt, self.labels, speech.query_count, config.llm.prompt.draw
        )
        self.collate.check_length(llm.config)
        self.checked: Checked | None = None
        self.captions: Tensor | None = None
        if config.align:
            self._align()

    def _align(self) -> None:
        """Take stage 1's heads and captions, for its loss beside that of the answers."""
        heads, card = exported.load_heads(exported.find(self.config.stage1, 1))
        heads.config = replace(heads.config, beta=0.0)  # without the term of parallel clips
        said = {label: card.get("captions", {}).get(label) or prompts.captions(label) for label in self.labels}
        tower = TextTower(card["text"], self.device)
        self.captions = tower.embed([caption for texts in said.values() for caption in texts])  # (C, text_width)
        self.collate.captions = numbered(said)
        self.model.align, self.model.align_weight = heads, self.config.align

    def step(self, engine: Engine, batches: list[Batch], done: float) -> tuple[Stats, list[float]]:
        """Accumulate over the micro-batches the mean loss of all ranks' answer tokens. Collective.

        Returns the mean telemetry and each micro-batch's loss.
        """
        tokens = sum(
            float(batch["weights"].sum() if "weights" in batch else (batch["labels"] != IGNORE).sum())
            for batch in batches
        )
        [everywhere, count] = distributed.all_sum([tokens, float(len(batches))])
        sums: Stats = {}
        losses = []
        for batch in batches:
            moved = self.model.speech.prepared(batch, self.device)
            if self.captions is not None:
                moved["text"] = self.captions[moved["caption"]]
            loss, stats = engine.forward({**moved, "normalizer": everywhere / count})
            losses.append(loss.detach())
            engine.backward(poison(loss))
            engine.step()
            for name, value in stats.items():
                sums[name] = sums.get(name, 0) + value.float() / len(batches)
        sums |= self.model.speech.layer_shares()
        return sums, torch.stack(losses).tolist()  # DeepSpeed has waited for the device already, for the gradient norm

    @cached_property
    def _count(self) -> StepCount:
        return StepCount(self.model)

    def loads(self, batches: list[Batch]) -> list[Load]:
        """What each micro-batch of a step costs."""
        flash = is_flash(self.model.llm_config)
        return [
            self._count(Heard(batch["lengths"], bool(batch.get("encoded"))), *work_of(batch, flash))
            for batch in batches
        ]

    def weigh(self, counts: list[int]) -> str:
        """Weight the training clips by `train.class_weights`; counts: of each label. What to tell of it."""
        self.collate.weights = class_weights(self.config.train.class_weights, self.labels, counts)
        if self.collate.weights is None:
            return ""
        shown = [f"{label} {weight:.3g}" for label, weight in zip(self.labels, self.collate.weights, strict=True)]
        return f"class weights: {', '.join(shown)}"

    def scorer(self) -> AnswerScorer:
        return AnswerScorer(self.model, self.tokenizer, self.prompt, self.labels)

    def check(self) -> str:
        """Raise `UserError` if the model cannot be trained or scored rightly; what was found. Collective.

        Sets how micro-batches are packed: as the config asks for, or the next way that this LLM can take.
        """
        wanted, why = self.config.llm.packing, ""
        if wanted == "prefix" and self.prompt.order == "speech_first":
            wanted, why = "rows", "not prefix: with llm.order=speech_first clips share none"
        checked = check_llm(self.model, self.collate.prompts, self.collate.answers, self.device, wanted)
        if why:
            checked = replace(checked, not_packed="; ".join(filter(None, [why, checked.not_packed])))
        self.collate.packing, self.checked = checked.packing, checked
        self.model.label_smoothing = self.config.train.label_smoothing  # from here on: what is checked is likelihoods
        lora = adapted(self.model.llm)
        adapters = [f"LoRA adapts {', '.join(f'{n} {name}' for name, n in lora.items())}"] if lora else []
        return "\n".join([str(checked), checked.packed, *adapters])

    def facts(self) -> dict[str, str]:
        """What the tracker records beside the config, once `check` has found it."""
        checked = self.checked
        assert checked is not None
        return {
            "packing": checked.packing,
            "packing.reason": checked.not_packed or "asked for",
            "attention.kernel.llm": checked.kernel,
            "scores_by": checked.scores_by,
        }

    def card(self) -> dict[str, Any]:
        card = exported.speech_llm_card(self.model, self.base)
        return {**card, "stage1": self.config.stage1, "prompt": asdict(self.prompt)}


def build(
    config: cfg.Stage1 | cfg.Stage2, attention: Attention, device: str, ds_json: dict[str, Any]
) -> Align | Instruct:
    """The stage that a config asks for; `ds_json` tells whether pretrained LLM weights are partitioned as they load."""
    if isinstance(config, cfg.Stage1):
        return Align(config, attention, device)
    return Instruct(config, attention, device, ds_json)
