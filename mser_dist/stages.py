"""What differs between the two stages.

Each has `model`, a module that returns (loss, telemetry) of a batch; `features`, what its encoder is fed; `collate`,
which makes a batch of clips in a worker; `prepare`, which finishes a step's micro-batches on the training process;
`scorer`, which scores the labels of a batch for validation; `card`, what the exported model is; and `source`, the card
of the run that this one builds on, if any.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mser_dist import config as cfg
from mser_dist import exported
from mser_dist.data import prompts
from mser_dist.data.loader import Clip
from mser_dist.data.stream import pad_speech
from mser_dist.errors import UserError
from mser_dist.models.aligner import Aligner
from mser_dist.models.attention import Attention
from mser_dist.models.llm import build_llm
from mser_dist.models.scoring import AnswerScorer, PromptScorer
from mser_dist.models.speech import build_speech
from mser_dist.models.speech_llm import IGNORE, SPEECH, SpeechLLM
from mser_dist.models.text import TextTower

Batch = dict[str, Any]
Total = Callable[[list[float]], list[float]]  # sums numbers over all ranks


class Align:
    """Stage 1: contrastive alignment with the captions of each clip's label."""

    def __init__(self, config: cfg.Stage1, attention: Attention, device: str) -> None:
        self.config = config
        self.labels = config.data.labels
        self.tower = TextTower(config.text.pretrained, device)
        self.source: dict[str, Any] | None = None
        if config.init_from:
            export = exported.find(config.init_from, stage=1)
            self.source = exported.read_card(export)
            _same_shape(config, self.source["speech"])
            speech = exported.load_speech(export, attention)
            if config.encoder.freeze:
                speech.freeze_encoder()
        else:
            speech = build_speech(config.encoder, config.qformer, attention)
        speech.encoder.pad_seconds = config.encoder.pad_seconds
        longest = getattr(speech.encoder, "max_frames", None)  # Whisper's; the others have none
        if longest and (config.encoder.pad_seconds or 0) * 100 > longest:
            raise UserError(
                f"encoder.pad_seconds={config.encoder.pad_seconds}: the encoder takes {longest / 100:g} s at most"
            )
        self.model = Aligner(speech, self.tower.width, config.contrastive)
        self.features = speech.encoder.features
        self.collate = AlignCollate(self.labels)
        self.tower.embed([c for label in self.labels for c in prompts.captions(label)])

    def prepare(self, batches: list[Batch], total: Total) -> None:
        """Replace the captions by their embeddings."""
        for batch in batches:
            batch["text"] = self.tower.embed(batch.pop("captions"))

    def scorer(self) -> PromptScorer:
        return PromptScorer(self.model, self.tower, self.labels)

    def card(self) -> dict[str, Any]:
        return {"text": self.tower.name, "text_width": self.tower.width, **exported.aligner_card(self.model)}


def _same_shape(config: cfg.Stage1, card: dict[str, Any]) -> None:
    """Raise `UserError` where a config asks for another model than the one that `init_from` brings."""
    qformer, arch = card["qformer"], config.encoder.arch
    if arch:
        arch = {"model_type": "whisper", **arch}
    brought = {
        "qformer.queries": (config.qformer.queries, card["queries"]),
        "qformer.layers": (config.qformer.layers, qformer["num_hidden_layers"]),
        "qformer.width": (config.qformer.width, qformer["hidden_size"]),
        "qformer.heads": (config.qformer.heads, qformer["num_attention_heads"]),
        **{f"encoder.arch.{key}": (value, card["encoder"].get(key)) for key, value in arch.items()},
    }
    for key, (wanted, there) in brought.items():
        if wanted != there and not key.endswith("dropout"):
            raise UserError(f"{key}={wanted}, but init_from={config.init_from} brings {there}: set {key}={there}")


class AlignCollate:
    """Clips → padded speech, ids, and a caption drawn for each clip."""

    def __init__(self, labels: list[str]) -> None:
        self.captions = [prompts.captions(label) for label in labels]

    def __call__(self, clips: list[Clip]) -> Batch:
        return {
            **pad_speech(clips),
            "label": torch.tensor([clip.label for clip in clips]),
            "source": torch.tensor([clip.source for clip in clips]),
            "captions": [str(clip.draw.choice(self.captions[clip.label])) for clip in clips],
        }


class Instruct:
    """Stage 2: the LLM answers an instruction about the clip with its label."""

    def __init__(self, config: cfg.Stage2, attention: Attention, ds_json: dict[str, Any]) -> None:
        self.config = config
        self.labels = config.data.labels
        export = exported.find(config.stage1, stage=1)
        self.source: dict[str, Any] | None = exported.read_card(export)
        speech = exported.load_speech(export, attention)
        if config.freeze_encoder:
            speech.freeze_encoder()
        if config.freeze_qformer:
            speech.qformer.requires_grad_(False)
            speech.queries.requires_grad_(False)
        llm, self.tokenizer = build_llm(config.llm, self.labels, attention, ds_json)
        self.model = SpeechLLM(speech, llm)
        self.features = speech.encoder.features
        self.collate = InstructCollate(self.tokenizer, self.labels, speech.query_count)

    def prepare(self, batches: list[Batch], total: Total) -> None:
        """Share out the loss: the mean over the answer tokens of all ranks and micro-batches of the step."""
        tokens = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
        [tokens_everywhere, losses] = total([float(tokens), float(len(batches))])
        for batch in batches:
            batch["normalizer"] = tokens_everywhere / losses

    def scorer(self) -> AnswerScorer:
        return AnswerScorer(self.model, self.tokenizer, self.labels)

    def card(self) -> dict[str, Any]:
        return {**exported.speech_llm_card(self.model, self.config.llm.pretrained), "stage1": self.config.stage1}


class InstructCollate:
    """Clips → padded speech and chat prompts with the answer behind them; only the answer has labels."""

    def __init__(self, tokenizer: Any, labels: list[str], queries: int) -> None:
        self.prompts = [
            prompts.prompt_ids(tokenizer, instruction, queries, SPEECH) for instruction in prompts.instructions(labels)
        ]
        self.answers = [prompts.answer_ids(tokenizer, label) for label in labels]
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def __call__(self, clips: list[Clip]) -> Batch:
        rows = []
        for clip in clips:
            prompt = self.prompts[int(clip.draw.integers(len(self.prompts)))]
            rows.append((prompt, self.answers[clip.label]))
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), width), self.pad)  # (B, T)
        labels = torch.full((len(rows), width), IGNORE)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.tensor([*prompt, *answer])
            labels[i, len(prompt) : end] = torch.tensor(answer)
            mask[i, :end] = 1
        return {**pad_speech(clips), "input_ids": ids, "labels": labels, "attention_mask": mask}


def build(
    config: cfg.Stage1 | cfg.Stage2, attention: Attention, device: str, ds_json: dict[str, Any]
) -> Align | Instruct:
    """The stage that a config asks for; `ds_json` tells whether pretrained LLM weights are partitioned as they load."""
    if isinstance(config, cfg.Stage1):
        return Align(config, attention, device)
    return Instruct(config, attention, ds_json)


def to_device(batch: Batch, device: str) -> Batch:
    """A batch with its tensors on `device`."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
