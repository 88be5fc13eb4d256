"""How each stage scores the labels of a clip. One scorer for validation in training and for the final evaluation.

A scorer tells of B clips "scores" (B, K), the largest of which is its answer, and what else it knows, (B, …) by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models import chat, prompts
from mser_dist.models.aligner import Aligner
from mser_dist.models.chat import ChatPrompt
from mser_dist.models.decoding import bare, generate, greedy_ranks
from mser_dist.models.likelihood import Likelihoods
from mser_dist.models.packed import SPEECH
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.models.text import TextTower
from mser_dist.models.wording import LONGEST
from mser_dist.ranks import distributed

MOST_TOKENS = 16  # of an answer in the LLM's own words: a label has few, and what goes on so long names none


class PromptScorer:
    """Stage 1: cosine of a clip with each label's captions, averaged in the shared space.

    captions: those that the model was trained with; a label that has none there has the shipped ones. each: besides,
    the cosines with one caption of every label alone, as many times as each label has captions (`by_prompt`, (B, P,
    K)).
    """

    def __init__(
        self,
        model: Aligner,
        tower: TextTower,
        labels: list[str],
        captions: Mapping[str, list[str]] | None = None,
        each: bool = False,
    ) -> None:
        self.model = model
        self.each = each
        own = captions or {}
        self.texts = [
            tower.embed(own.get(label) or prompts.captions(label)) for label in labels
        ]  # K × (P_k, text_width)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """ "scores": cosines (B, K); "embedding": of the clips in the shared space, of unit length (B, D)."""
        captions = [self.model.embed_text(text) for text in self.texts]  # K × (P_k, D)
        labels = torch.stack([each.mean(0) for each in captions])  # (K, D)
        speech = self.model.embed_speech(batch["speech"], batch["lengths"])  # (B, D)
        cosines = speech @ nn.functional.normalize(labels, dim=-1).T
        found = {"scores": cosines.float(), "embedding": speech.float()}
        if self.each:
            alone = torch.stack([each[: min(map(len, captions))] for each in captions], 1)  # (P, K, D)
            found["by_prompt"] = torch.einsum("bd,pkd->bpk", speech, nn.functional.normalize(alone, dim=-1)).float()
        return found

    @torch.no_grad()
    def scale(self) -> float:
        """That makes the scores log-probabilities up to a constant, as training has learned it. Collective."""
        return float(self.model.scale()[0][0])


class AnswerScorer:
    """Stage 2: log-likelihood of each label's answer, its end included. For weights that stay as they are: see `score`.

    score: of each wording, made at the first batch that has it on some rank; it keeps the keys and values of the
    prompts for those that follow. With transcripts in the prompt each clip has prompts of its own.

    protocol: what an evaluation asks for; None: the sum behind the first instruction, and nothing else. Raises
    `UserError` for more instructions than there are, and labels that the LLM cannot tell apart.
    """

    def __init__(
        self,
        model: SpeechLLM,
        tokenizer: Any,
        prompt: ChatPrompt,
        labels: list[str],
        protocol: cfg.ProtocolConfig | None = None,
    ) -> None:
        self.model, self.protocol = model, protocol
        self._tokenizer, self._chat = tokenizer, prompt
        numbers = range(len(prompt.wordings))
        self._words = [prompt.words_for(labels, number) for number in numbers]
        wanted = 1 if protocol is None else protocol.instructions
        self._instructions = [_instructions(prompt, labels, number, wanted) for number in numbers]
        self._answers = [chat.answers(tokenizer, words) for words in self._words]
        self.prompts, self.answers = self._ids(0), self._answers[0]
        if protocol is not None:  # a training has looked already
            asked = max(len(ids) for number in numbers for ids in self._ids(number))
            longest = max(len(answer) for answers in self._answers for answer in answers)
            free = MOST_TOKENS if "free" in protocol.decode else 0
            chat.check_length(model.llm_config, asked + max(longest, free) + LONGEST * prompt.transcript)
        self.score: dict[int, Likelihoods] = {}
        self._prior: dict[int, Tensor] = {}  # (P, K) of each wording: the log-likelihood behind no speech

    def _ids(self, number: int, transcript: str = "") -> list[list[int]]:
        """The prompts of a wording, one for each instruction."""
        queries = self.model.speech.query_count
        asked = self._instructions[number]
        return [self._chat.ids(self._tokenizer, text, queries, SPEECH, transcript) for text in asked]

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """By the config's `protocol`: `scores` by its `score`, the mean over P instructions. Collective where there are
        several wordings, or free answers.

        Where there is a protocol: `sum`, `mean` and `prior` (B, K), means over the instructions; of several `by_prompt`
        (B, P, K), of each the score that decides. Under the first instruction alone: `constrained` (B, K), whose
        largest is the label that greedy decoding gives; `generated` (B, MOST_TOKENS), the ids of the free answer, and
        `free` (B,), the number of its label, -1 for none.
        """
        tokens = self.model.speech(batch["speech"], batch["lengths"])  # (B, Q, width)
        asked = batch.get("wording") or [0] * len(tokens)
        if self._chat.transcript:
            parts = []
            for row, (number, text) in enumerate(zip(asked, batch["text"], strict=True)):
                ids, own = self._ids(number, text), tokens[row : row + 1]
                log_p = Likelihoods(self.model, ids, self._answers[number], tokens.device).of(
                    torch.cat([own, torch.zeros_like(own)]) if self.protocol else own
                )
                parts.append(self._found(number, ids[0], own, log_p[:1], log_p[1:].sum(-1)))
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        found: dict[str, Tensor] = {}
        # A forward pass under ZeRO-3 is one of all ranks: what one has to score, the others score on a clip of theirs.
        present = [int(number in asked) for number in range(len(self._answers))]
        for number, wanted in enumerate(distributed.most(present) if len(present) > 1 else present):
            if not wanted:
                continue
            ids = self._ids(number)
            if number not in self.score:
                score = Likelihoods(self.model, ids, self._answers[number], tokens.device)
                self.score[number] = score
                if self.protocol:
                    self._prior[number] = score.of(torch.zeros_like(tokens[:1])).sum(-1)
            rows = [row for row, other in enumerate(asked) if other == number]
            given = tokens[torch.tensor(rows or [0], device=tokens.device)]
            here = self._found(number, ids[0], given, self.score[number].of(given), self._prior.get(number))
            for name, values in here.items() if rows else ():
                whole = found.setdefault(name, values.new_zeros((len(tokens), *values.shape[1:])))
                whole[torch.tensor(rows, device=values.device)] = values
        return found

    def _found(
        self, number: int, first: list[int], tokens: Tensor, log_p: Tensor, prior: Tensor | None
    ) -> dict[str, Tensor]:
        """What is asked for, of clips of one wording: log_p (B, P, K, L); prior (1, P, K); first: the first prompt."""
        total = log_p.sum(-1)  # (B, P, K)
        if self.protocol is None:
            return {"scores": total[:, 0]}
        assert prior is not None
        answers = self._answers[number]
        length = torch.tensor([len(answer) for answer in answers], device=total.device)
        scores = {"sum": total, "mean": total / length, "prior": total - prior}
        main = scores[self.protocol.score]
        found = {"scores": main.mean(1), **{name: each.mean(1) for name, each in scores.items()}}
        if main.shape[1] > 1:
            found["by_prompt"] = main
        if "constrained" in self.protocol.decode:
            found["constrained"] = greedy_ranks(log_p[:, 0], answers)
        if "free" in self.protocol.decode:
            said = generate(self.model, first, tokens, MOST_TOKENS, self._tokenizer.eos_token_id)
            words = [bare(word) for word in self._words[number]]
            names = [bare(text) for text in self.texts(said)]
            found["generated"] = said
            found["free"] = torch.tensor([words.index(name) if name in words else -1 for name in names])
        return found

    def scale(self) -> float | None:
        """Log-likelihoods are log-probabilities as they are; None for their means over tokens, which are none."""
        return None if self.protocol and self.protocol.score == "mean" else 1.0

    def texts(self, generated: Any) -> list[str]:
        """What was generated, (n, MOST_TOKENS) token ids, as text, without the tokens that no text has."""
        decoded = self._tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [text.strip() for text in decoded]


def _instructions(prompt: ChatPrompt, labels: list[str], number: int, wanted: int | Sequence[str]) -> list[str]:
    """The instructions of a wording that an evaluation wants: so many of its own, or others."""
    if not isinstance(wanted, int):
        return prompts.instructions(prompt.words_for(labels, number), wanted)
    known = prompt.instructions(labels, number)
    if wanted > len(known):
        where = next(filter(None, prompt.wordings[number][::-1]), "")
        raise UserError(
            f"protocol.instructions={wanted}: the run of stage 2 knows {len(known)}{f' for {where}' if where else ''}: "
            "ask for so many, or give a list of texts"
        )
    return known[:wanted]
