"""What workers make of a stage's clips: a batch, with captions drawn or prompts packed; and what runs keep of both."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedConfig

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.files import write_json
from mser_dist.models import chat, prompts
from mser_dist.models.chat import ChatPrompt
from mser_dist.models.packed import SPEECH, Packing, Sample, batch_of
from mser_dist.models.wording import LONGEST, captions_of
from mser_dist.ranks import distributed
from mser_dist.stream.examples import pad_speech
from mser_dist.stream.loader import Example
from mser_dist.training.class_weights import weights_of

Batch = dict[str, Any]


class AlignCollate:
    """Clips → padded speech, ids, and a caption drawn for each clip: its number among those of all labels."""

    def __init__(self, captions: Mapping[str, list[str]]) -> None:
        self.captions = numbered(captions)

    def __call__(self, clips: list[Example]) -> Batch:
        return {
            **pad_speech(clips),
            "label": torch.tensor([clip.label for clip in clips]),
            "source": torch.tensor([clip.source for clip in clips]),
            "caption": torch.tensor([int(clip.draw.choice(self.captions[clip.label])) for clip in clips]),
        }


def numbered(captions: Mapping[str, list[str]]) -> list[np.ndarray]:
    """The numbers of each label's captions among those of all labels."""
    counts = [len(texts) for texts in captions.values()]
    return np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])


def kept_captions(out: Path, text: cfg.TextConfig, labels: list[str]) -> dict[str, list[str]]:
    """The captions of each label that a run began with; ``<out>/prompt.json`` keeps those of a file. Collective."""
    kept = out / "prompt.json"
    if text.captions is None:
        return captions_of(text, labels)
    found = None
    if kept.is_file():
        try:
            found = {label: json.loads(kept.read_text(encoding="utf-8"))["captions"][label] for label in labels}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{kept} is damaged ({error!r}): remove it to read the captions anew") from error
    agreed: dict[str, list[str]] = distributed.agree(found or captions_of(text, labels))
    if distributed.discover().is_main:
        write_json(kept, {"captions": agreed})
    return agreed


def kept_prompt(out: Path, llm: cfg.LLMConfig, tokenizer: Any, labels: Sequence[str]) -> ChatPrompt:
    """The prompt that a run began with; at its first start, the one that the LLM's template gives today. Collective.

    ``<out>/prompt.json`` keeps it: a template may print the date, and ranks may meet midnight.
    """
    kept = out / "prompt.json"
    prompt = None
    if kept.is_file():
        try:
            found = json.loads(kept.read_text(encoding="utf-8"))
            prompt = ChatPrompt(**found["prompt"]) if found["llm"] == llm.pretrained else None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{kept} is damaged ({error!r}): remove it to render the prompt anew") from error
    agreed: ChatPrompt = distributed.agree(prompt or chat.worded(tokenizer, llm, labels))
    if distributed.discover().is_main:
        write_json(kept, {"llm": llm.pretrained, "prompt": asdict(agreed)})
    return agreed


class InstructCollate:
    """Clips → padded speech and chat prompts with the answer behind them, packed or padded; only the answer has labels.

    Where instructions are shared, clips that are asked the same come to stand together: so may the order of a batch be
    another one than that of its clips.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: ChatPrompt,
        labels: list[str],
        queries: int,
        draw: Literal["batch", "clip"] = "batch",
    ) -> None:
        self._chat, self._tokenizer, self._queries, self._draw = prompt, tokenizer, queries, draw
        numbers = range(len(prompt.wordings))
        self._words = [prompt.words_for(labels, number) for number in numbers]  # by wording and label
        self._answers = [chat.answers(tokenizer, words) for words in self._words]
        self._made = {
            (number, text): self._ids(text) for number in numbers for text in prompt.instructions(labels, number)
        }
        self.prompts, self.answers = list(self._made.values()), [ids for found in self._answers for ids in found]
        self.weights: list[float] | None = None  # of clips by label
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.packing: Packing = "off"
        self.captions: list[np.ndarray] | None = None  # by label, the numbers to draw one from, for stage 1's loss

    def check_length(self, llm: PreTrainedConfig) -> None:
        """Raise `UserError` if the LLM has fewer positions than the longest prompt and answer have tokens."""
        longest = max(map(len, self.prompts)) + max(map(len, self.answers)) + LONGEST * self._chat.transcript
        chat.check_length(llm, longest)

    def __call__(self, clips: list[Example]) -> Batch:
        turn = float(clips[0].draw.random()) if self._draw == "batch" else 0.0
        asked = [self._asked(clip, turn) for clip in clips]
        if self.packing == "prefix":
            together = sorted(range(len(clips)), key=lambda i: asked[i][0])
            clips, asked = [clips[i] for i in together], [asked[i] for i in together]
        samples = [(ids, self._answers[clip.wording][clip.label]) for (_, ids), clip in zip(asked, clips, strict=True)]
        weights = weights_of(self.weights, clips, [answer for _, answer in samples])
        captions = {}
        if self.captions is not None:
            captions = {
                "emotion": torch.tensor([clip.label for clip in clips]),
                "caption": torch.tensor([int(clip.draw.choice(self.captions[clip.label])) for clip in clips]),
            }
        return {**pad_speech(clips), **batch_of(samples, self.packing, self.pad), **weights, **captions}

    def typical(self, clips: int) -> list[Sample]:
        """Prompts and answers of so many clips: one prompt, or all of them in turn, and each label."""
        asked = [0] * clips if self._draw == "batch" else sorted(i % len(self.prompts) for i in range(clips))
        return [(self.prompts[number], self.answers[i % len(self.answers)]) for i, number in enumerate(asked)]

    def _asked(self, clip: Example, turn: float) -> tuple[tuple[int, int, str], list[int]]:
        """The prompt of a clip, behind what it shares with the clips that are asked the same.

        turn: in [0, 1), what the micro-batch has drawn.
        """
        questions, words = self._chat.questions_for(clip.wording), self._words[clip.wording]
        number = int(turn * len(questions)) if self._draw == "batch" else int(clip.draw.integers(len(questions)))
        if self._chat.shuffle_options:
            words = [words[i] for i in clip.draw.permutation(len(words))]
        [text] = prompts.instructions(words, questions[number : number + 1])
        said = clip.text if self._chat.transcript else ""
        ids = self._made.get((clip.wording, text)) if not said else None
        return (clip.wording, number, text), ids or self._ids(text, said)

    def _ids(self, instruction: str, transcript: str = "") -> list[int]:
        return self._chat.ids(self._tokenizer, instruction, self._queries, SPEECH, transcript)
