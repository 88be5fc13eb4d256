"""How each stage scores the labels of a clip. One scorer for validation in training and for the final evaluation."""

from typing import Any

import torch
from torch import Tensor, nn

from mser_dist.models import chat, prompts
from mser_dist.models.aligner import Aligner
from mser_dist.models.chat import ChatPrompt
from mser_dist.models.likelihood import Likelihoods
from mser_dist.models.packed import SPEECH
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.models.text import TextTower


class PromptScorer:
    """Stage 1: cosine of a clip with each label's prompts, averaged in the shared space."""

    def __init__(self, model: Aligner, tower: TextTower, labels: list[str]) -> None:
        self.model = model
        self.texts = [tower.embed(prompts.label_prompts(label)) for label in labels]  # K × (P_k, text_width)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """(B, K) cosines."""
        labels = torch.stack([self.model.embed_text(text).mean(0) for text in self.texts])  # (K, D)
        speech = self.model.embed_speech(batch["speech"], batch["lengths"])  # (B, D)
        return speech @ nn.functional.normalize(labels, dim=-1).T


class AnswerScorer:
    """Stage 2: log-likelihood of each label's answer, its end included. For weights that stay as they are: see `score`.

    score: made at the first batch, and keeps the keys and values of the prompt for those that follow.
    """

    def __init__(self, model: SpeechLLM, tokenizer: Any, prompt: ChatPrompt, labels: list[str]) -> None:
        self.model = model
        instruction = prompt.instructions(labels)[0]
        self.prompt = prompt.ids(tokenizer, instruction, model.speech.query_count, SPEECH)
        self.answers = chat.answers(tokenizer, labels)
        self.score: Likelihoods | None = None

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """(B, K) log-likelihoods, summed over an answer's tokens."""
        if self.score is None:
            self.score = Likelihoods(self.model, self.prompt, self.answers, batch["speech"].device)
        return self.score(batch["speech"], batch["lengths"])
