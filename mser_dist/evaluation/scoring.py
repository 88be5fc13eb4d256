"""How each stage scores the labels of a clip. One scorer for validation in training and for the final evaluation.

A scorer tells of B clips "scores" (B, K), the largest of which is its answer, and what else it knows, (B, …) by name.
"""

from collections.abc import Mapping
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
from mser_dist.ranks import distributed


class PromptScorer:
    """Stage 1: cosine of a clip with each label's captions, averaged in the shared space.

    captions: those that the model was trained with; a label that has none there has the shipped ones.
    """

    def __init__(
        self, model: Aligner, tower: TextTower, labels: list[str], captions: Mapping[str, list[str]] | None = None
    ) -> None:
        self.model = model
        own = captions or {}
        self.texts = [
            tower.embed(own.get(label) or prompts.captions(label)) for label in labels
        ]  # K × (P_k, text_width)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """ "scores": cosines (B, K); "embedding": of the clips in the shared space, of unit length (B, D)."""
        labels = torch.stack([self.model.embed_text(text).mean(0) for text in self.texts])  # (K, D)
        speech = self.model.embed_speech(batch["speech"], batch["lengths"])  # (B, D)
        cosines = speech @ nn.functional.normalize(labels, dim=-1).T
        return {"scores": cosines.float(), "embedding": speech.float()}


class AnswerScorer:
    """Stage 2: log-likelihood of each label's answer, its end included. For weights that stay as they are: see `score`.

    score: of each wording, made at the first batch that has it on some rank; it keeps the keys and values of the prompt
    for those that follow. With transcripts in the prompt each clip has one of its own.
    """

    def __init__(self, model: SpeechLLM, tokenizer: Any, prompt: ChatPrompt, labels: list[str]) -> None:
        self.model, self._tokenizer, self._chat = model, tokenizer, prompt
        numbers = range(len(prompt.wordings))
        self._instructions = [prompt.instructions(labels, number)[0] for number in numbers]
        self._answers = [chat.answers(tokenizer, prompt.words_for(labels, number)) for number in numbers]
        self.prompt, self.answers = self._ids(0), self._answers[0]
        self.score: dict[int, Likelihoods] = {}

    def _ids(self, number: int, transcript: str = "") -> list[int]:
        queries = self.model.speech.query_count
        return self._chat.ids(self._tokenizer, self._instructions[number], queries, SPEECH, transcript)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """ "scores": log-likelihoods (B, K), of all of an answer's tokens. Collective if there are several wordings."""
        speech, lengths = batch["speech"], batch["lengths"]
        asked = batch.get("wording") or [0] * len(speech)
        if self._chat.transcript:
            found = []
            for row, (number, text) in enumerate(zip(asked, batch["text"], strict=True)):
                score = Likelihoods(self.model, self._ids(number, text), self._answers[number], speech.device)
                found.append(score(speech[row : row + 1], lengths[row : row + 1]))
            return {"scores": torch.cat(found).float()}
        scores = speech.new_zeros((len(speech), len(self.answers)), dtype=torch.float32)
        # A forward pass under ZeRO-3 is one of all ranks: what one has to score, the others score on a clip of theirs.
        present = [int(number in asked) for number in range(len(self._answers))]
        for number, wanted in enumerate(distributed.most(present) if len(present) > 1 else present):
            if not wanted:
                continue
            if number not in self.score:
                ids, answers = self._ids(number), self._answers[number]
                self.score[number] = Likelihoods(self.model, ids, answers, speech.device)
            rows = [row for row, other in enumerate(asked) if other == number]
            given = torch.tensor(rows or [0], device=speech.device)
            found_here = self.score[number](speech[given], lengths[given])
            if rows:
                scores[given] = found_here.float()
        return {"scores": scores}
