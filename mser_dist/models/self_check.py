"""Before a number is made: what this LLM says in our batches is what it says of each clip alone.

Every LLM has its own way from embeddings to logits, and some give one clip another's audio, lose what a prompt says, or
have a cache that many answers cannot share. So, on two clips of noise, our loss and our scores are held against the
plain forward pass: one clip, one answer, no padding, no cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mser_dist import deepspeed_parts
from mser_dist.audio import SAMPLE_RATE
from mser_dist.errors import UserError
from mser_dist.models.llm import base_of
from mser_dist.models.speech import SpeechModel
from mser_dist.models.speech_llm import IGNORE, SPEECH, SpeechLLM

_FLOOR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}  # nats that rounding may always come to
_SECONDS = (0.5, 0.3)


@dataclass(frozen=True)
class Checked:
    """What a check found: the largest difference of loss or score from the plain forward; how answers are scored."""

    difference: float
    shares_cache: bool
    why_not: str = ""

    def __str__(self) -> str:
        how = "read the prompt's cache" if self.shares_cache else f"are scored by whole forward passes ({self.why_not})"
        return f"self-check: loss and scores are the LLM's own to {self.difference:.1e}; answers {how}"


def check_speech(speech: SpeechModel, device: str) -> None:
    """Raise `UserError` if a clip's emotion tokens depend on the other clips of its batch. Collective under ZeRO-3."""
    with _at_rest(speech):
        _emotion_tokens(speech, device)


def check_llm(model: SpeechLLM, prompts: Sequence[list[int]], answers: Sequence[list[int]], device: str) -> Checked:
    """Hold `model` against the plain forward of its LLM, and set `model.shares_cache`. Collective under ZeRO-3.

    prompts: token ids with SPEECH in them, two of different length where there are such. answers: token ids, end
    included. Raises `UserError` that names the LLM's class where it cannot be used.
    """
    name = type(base_of(model.llm)).__name__
    with _at_rest(model):
        speech, lengths = _emotion_tokens(model.speech, device)
        try:
            return _check_llm(_Trial(model, prompts, answers, speech, lengths))
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a class does that takes no embeddings, or no mask
            first = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            remedy = "choose another LLM"
            if any(map(deepspeed_parts.is_partitioned, model.llm.parameters())):
                remedy = (
                    "it may read weights past their modules, where ZeRO-3 has parts alone: try engine.deepspeed=zero2"
                )
            raise UserError(f"{name} cannot be given a prompt with speech ({first}): {remedy}") from error


class _Trial:
    """Two clips of noise, a short and a long prompt, a short and a long answer; and the plain forward of an LLM."""

    def __init__(
        self,
        model: SpeechLLM,
        prompts: Sequence[list[int]],
        answers: Sequence[list[int]],
        speech: Tensor,
        lengths: Tensor,
    ) -> None:
        self.model = model
        self.name = type(base_of(model.llm)).__name__
        self.embed = model.llm.get_input_embeddings()
        self.speech, self.lengths = speech, lengths
        ends = sorted(answers, key=len)
        self.answers = [torch.tensor(answer, device=speech.device) for answer in (ends[0], ends[-1])]
        self.prompts = [torch.tensor(f(prompts, key=len), device=speech.device) for f in (min, max)]
        self.inputs = [self.alone(clip, self.prompts[0]) for clip in (0, 1)]
        self.reference = self.likelihoods(self.inputs)
        # What rounding does here: the same clips, their inputs moved by one unit in the last place.
        rounding = _largest(self.likelihoods([_rounded(x) for x in self.inputs]), self.reference)
        self.allowed = _FLOOR[self.inputs[0].dtype] + 8 * rounding

    def alone(self, clip: int, prompt: Tensor) -> Tensor:
        """(1, T, D): a prompt with one clip, cut to its own length."""
        return self.model.embed_prompt(prompt[None], *alone(self.model.speech, self.speech, self.lengths, clip))

    def plain(self, inputs: Tensor, prompt: Tensor, answer: Tensor) -> Tensor:
        """(L, V): log-probabilities of an answer's places behind (1, T, D) inputs, the embeddings of `prompt`."""
        whole = torch.cat([inputs, self.embed(answer[:-1])[None]], 1)
        logits, _ = self.model.logits(whole, torch.cat([prompt, answer[:-1]])[None])
        return logits[0, len(prompt) - 1 :].float().log_softmax(-1)

    def likelihood(self, inputs: Tensor, prompt: Tensor, answer: Tensor) -> float:
        return float(self.plain(inputs, prompt, answer)[torch.arange(len(answer)), answer].sum())

    def likelihoods(self, inputs: list[Tensor]) -> Tensor:
        """(clips, answers) behind the short prompt."""
        return torch.tensor([[self.likelihood(x, self.prompts[0], answer) for answer in self.answers] for x in inputs])

    def hold(self, difference: float, what: str) -> float:
        """`difference`, unless it is more than rounding."""
        if not difference <= self.allowed:  # NaN too
            raise UserError(f"{self.name} cannot be used here: {what} ({difference:.2g}): choose another LLM")
        return difference

    def reads_as_it_should(self) -> None:
        """Raise `UserError` for an LLM whose logits are not those of the speech and words before each place."""
        if not torch.isfinite(self.reference).all():
            raise UserError(f"{self.name} gives logits that are not finite: its weights are damaged, copy them again")
        prompt, answer = self.prompts[0], self.answers[1]
        words = torch.cat([prompt[prompt != SPEECH], answer])[None]
        by_ids = base_of(self.model.llm)(input_ids=words, use_cache=False).logits.float().log_softmax(-1)
        by_embeddings = self.model.logits(self.embed(words), words)[0].float().log_softmax(-1)
        self.hold(_largest(by_ids, by_embeddings), "words given as embeddings are others to it than words by number")
        one, other = (self.plain(self.inputs[0], prompt, a)[0] for a in (answer, answer.flip(0)))
        self.hold(_largest(one, other), "what it says of a word depends on the words behind it, it is not causal")
        places = (prompt == SPEECH)[None, :, None]
        words_there = [x.masked_scatter(places, self.embed(answer[:1]).expand(x.shape)) for x in self.inputs]
        if _largest(self.likelihoods(words_there), self.reference) == 0:
            raise UserError(f"{self.name} says the same whatever stands where the speech does: choose another LLM")

    def loss(self) -> float:
        """Difference of the loss of both prompts and clips in one padded batch, as in training, times its tokens."""
        rows = list(zip(self.prompts, self.answers[::-1], strict=True))
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.zeros(2, width, dtype=torch.long, device=self.speech.device)
        labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[row, :end], labels[row, len(prompt) : end] = torch.cat([prompt, answer]), answer
            mask[row, :end] = 1
        batch = {"speech": self.speech, "lengths": self.lengths, "input_ids": ids, "labels": labels}
        ours = float(self.model({**batch, "attention_mask": mask, "normalizer": 1})[0])
        alone = [self.likelihood(self.alone(i, prompt), prompt, answer) for i, (prompt, answer) in enumerate(rows)]
        return abs(ours + sum(alone))

    def scores(self, score: Callable[[Tensor, Tensor, list[Tensor]], Tensor]) -> float:
        """Largest difference of the scores of both clips in one batch."""
        prompt = self.prompts[0]
        together = self.model.embed_prompt(prompt.expand(2, -1), self.speech, self.lengths)
        return _largest(score(together, prompt, self.answers).cpu(), self.reference)


def _check_llm(trial: _Trial) -> Checked:
    model = trial.model
    trial.reads_as_it_should()
    difference = trial.hold(trial.loss(), "the loss of a padded batch is not that of its clips")
    whole = trial.hold(trial.scores(model.score_whole), "the scores of a batch are not those of its clips")
    why = ""
    try:
        shared = trial.scores(model.score_shared)
        if not shared <= trial.allowed:
            why = f"by its cache they differ by {shared:.2g}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # hybrid, recurrent and missing caches, each with an error of its own
        why = f"its cache cannot be shared: {type(error).__name__}"
    model.shares_cache = not why
    return Checked(max(difference, whole if why else shared), model.shares_cache, why)


def _emotion_tokens(speech: SpeechModel, device: str) -> tuple[Tensor, Tensor]:
    """Two clips of noise as the model takes a batch, and their lengths (2,); their tokens are checked."""
    noise, encoder = np.random.default_rng(0), speech.any_encoder
    clips = [
        torch.from_numpy(encoder.features(noise.normal(0, 0.1, round(s * SAMPLE_RATE)).astype(np.float32)))
        for s in _SECONDS
    ]
    lengths = torch.tensor([encoder.features.size(s) for s in _SECONDS])
    batch = torch.zeros(2, *clips[0].shape[:-1], max(clip.shape[-1] for clip in clips))
    for row, clip in enumerate(clips):
        batch[row, ..., : clip.shape[-1]] = clip
    given = speech.prepared({"speech": batch, "lengths": lengths}, device)
    batch, lengths = given["speech"], given["lengths"]
    unit = torch.finfo(next(speech.parameters()).dtype).eps
    tokens = speech(batch, lengths)
    trained = speech.encoder
    features, mask = trained(batch, lengths) if trained else (batch, torch.ones(batch.shape[:2], dtype=torch.bool))
    for row in (0, 1):
        own = alone(speech, batch, lengths, row)
        pairs = [(speech(*own)[0], tokens[row])]
        if trained:  # a fresh Q-Former hears little of the encoder, so that is looked at too
            pairs.append((trained(*own)[0][0], features[row, mask[row]]))
        for by_itself, together in pairs:
            apart, size = _largest(by_itself, together), float(together.abs().max())
            if not apart <= max(1e-4, 16 * unit) * max(1.0, size):
                raise UserError(
                    f"what {type(encoder).__name__} makes of a clip depends on the other clips of its batch (by "
                    f"{apart:.2g} of {size:.2g}): choose another encoder"
                )
    if _largest(tokens[0], tokens[1]) == 0:
        raise UserError("the speech model gives two different clips the same emotion tokens: its weights are damaged")
    return batch, lengths


def alone(speech: SpeechModel, batch: Tensor, lengths: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """One clip of a batch that a model takes, without the padding that the others brought, and its length (1,)."""
    own = lengths[row : row + 1]
    if speech.encoder is None:
        return batch[row : row + 1, : int(own)], own
    return batch[row : row + 1, ..., : int(speech.encoder.fed(own))], own


def _rounded(x: Tensor) -> Tensor:
    """x with each value one unit in the last place up or down, at random but always the same."""
    up = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device) < 0.5
    return x * (1 + torch.finfo(x.dtype).eps * torch.where(up, 1.0, -1.0).to(x.dtype))


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; the mode of every part comes back."""
    training = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in training.items():
            part.training = mode
