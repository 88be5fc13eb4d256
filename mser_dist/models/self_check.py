"""Before a number is made: what this LLM says in our batches is what it says of each clip alone.

Every LLM has its own way from embeddings to logits, and some give one clip another's audio, lose what a prompt says, or
have a cache that many answers cannot share. So, on two clips of noise, our loss and our scores are held against the
plain forward pass: one clip, one answer, no padding, no cache.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mser_dist import deepspeed_parts
from mser_dist.audio import SAMPLE_RATE
from mser_dist.errors import UserError
from mser_dist.models.likelihood import Likelihoods, Way
from mser_dist.models.llm import base_of
from mser_dist.models.packed import SPEECH, Packing, batch_of, is_flash
from mser_dist.models.speech import SpeechModel
from mser_dist.models.speech_llm import SpeechLLM

_FLOOR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}  # nats that rounding may always come to
_SECONDS = (0.5, 0.3)
_RECURRENT = (
    "linear",
    "conv",
    "mamba",
    "recurrent",
    "hybrid",
)  # of layer types: whose state fades, and may seem to end


@dataclass(frozen=True)
class Checked:
    """What a check found: the largest difference of loss or score from the plain forward; how a batch is read."""

    difference: float
    scores_by: Way
    packing: Packing
    kernel: str  # of the LLM's attention
    not_scored: str = ""  # why not by a quicker way
    not_packed: str = ""  # why not as it was asked for
    not_chosen: str = ""  # why not by the kernel that was chosen

    @property
    def shares_cache(self) -> bool:
        """Whether all answers read one cache of the prompt."""
        return self.scores_by != "whole"

    def __str__(self) -> str:
        scored = {
            "tree": "all answers are scored in one pass behind the prompt's kept start",
            "cache": "answers read the prompt's cache",
            "whole": "answers are scored by whole forward passes",
        }[self.scores_by]
        reason = f" ({self.not_scored})" if self.not_scored else ""
        kernel = f"; attention by {self.kernel}: {self.not_chosen}" if self.not_chosen else ""
        return f"self-check: loss and scores are the LLM's own to {self.difference:.1e}; {scored}{reason}{kernel}"

    @property
    def packed(self) -> str:
        """How a micro-batch of clips is given to the LLM, by which kernel, and why."""
        how = {
            "prefix": "one row, each instruction once",
            "rows": "one row, whole samples",
            "off": "padded rows",
        }[self.packing]
        reason = f"; {self.not_packed}" if self.not_packed else ""
        return f"llm.packing: {self.packing} ({how}), attention by {self.kernel}{reason}"


def check_speech(speech: SpeechModel, device: str) -> None:
    """Raise `UserError` if a clip's emotion tokens depend on the other clips of its batch. Collective under ZeRO-3."""
    with _at_rest(speech):
        _emotion_tokens(speech, device)


def check_llm(
    model: SpeechLLM,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    device: str,
    packing: Packing | None = None,
) -> Checked:
    """Hold `model` against the plain forward of its LLM, and set `model.scores_by`. Collective under ZeRO-3.

    prompts: token ids with SPEECH in them, two of different length where there are such. answers: token ids, end
    included. packing: the one that a training asks for; what comes out is the next one that is right. Raises
    `UserError` that names the LLM's class where it cannot be used.
    """
    name = type(base_of(model.llm)).__name__
    with _at_rest(model):
        speech, lengths = _emotion_tokens(model.speech, device)
        try:
            return _check_llm(model, prompts, answers, speech, lengths, packing)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a class does that takes no embeddings, or no mask
            remedy = "choose another LLM"
            if any(map(deepspeed_parts.is_partitioned, model.llm.parameters())):
                remedy = (
                    "it may read weights past their modules, where ZeRO-3 has parts alone: try engine.deepspeed=zero2"
                )
            raise UserError(f"{name} cannot be given a prompt with speech ({_named(error)}): {remedy}") from error


def _named(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


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
        self.inputs = [self.alone(clip, self.prompts[1]) for clip in (0, 1)]
        self.reference = self.likelihoods(self.inputs)  # (clips, answers)
        self._alone: float | None = None  # likelihood of the samples that the losses are of
        # What rounding does here: the same clips, their inputs moved by one unit in the last place.
        rounding = _largest(self.likelihoods([_rounded(x) for x in self.inputs]), self.reference)
        self.allowed = _FLOOR[self.inputs[0].dtype] + 8 * rounding
        self.several = len(self.prompts[0]) != len(self.prompts[1])
        self.by_prompt = self.reference[:, None]  # (clips, prompts, answers)
        if self.several:
            short = self.likelihoods([self.alone(clip, self.prompts[0]) for clip in (0, 1)], self.prompts[0])
            self.by_prompt = torch.stack([short, self.reference], 1)

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

    def likelihoods(self, inputs: list[Tensor], prompt: Tensor | None = None) -> Tensor:
        """(clips, answers) behind a prompt, the long one if none is named."""
        asked = self.prompts[1] if prompt is None else prompt
        return torch.tensor([[self.likelihood(x, asked, answer) for answer in self.answers] for x in inputs])

    def hold(self, difference: float, what: str) -> float:
        """`difference`, unless it is more than rounding."""
        if not difference <= self.allowed:  # NaN too
            raise UserError(f"{self.name} cannot be used here: {what} ({difference:.2g}): choose another LLM")
        return difference

    def reads_as_it_should(self) -> None:
        """Raise `UserError` for an LLM whose logits are not those of the speech and words before each place."""
        if not torch.isfinite(self.reference).all():
            raise UserError(f"{self.name} gives logits that are not finite: its weights are damaged, copy them again")
        prompt, answer = self.prompts[1], self.answers[1]
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

    def loss(self, packing: Packing) -> float:
        """Difference of the loss of three samples in one batch, as in training, from that of each alone.

        Infinite if a sample of a packed row hears another one, however little: rounding is no excuse there.
        """
        short, long = self.prompts
        few, many = self.answers
        samples = [(short, many), (long, few), (long, many)]
        batch = batch_of([(prompt.tolist(), answer.tolist()) for prompt, answer in samples], packing)
        batch = {key: x.to(self.speech.device) if isinstance(x, Tensor) else x for key, x in batch.items()}

        def loss(clips: list[int], **other: Any) -> float:
            given = {"speech": self.speech[clips], "lengths": self.lengths[clips], "normalizer": 1}
            return float(self.model({**batch, **given, **other})[0])

        if packing != "off":  # the last sample behind others of another clip that say other words
            last, words = {"at": batch["at"][-len(many) :]}, batch["input_ids"].clone()
            words[:, batch["at"][: -len(many)] + 1] = long[0]
            one, other = loss([0, 1, 0], **last), loss([1, 0, 0], **last, input_ids=words)
            if not abs(one - other) <= 8 * torch.finfo(self.inputs[0].dtype).eps * max(1.0, abs(one)):
                return math.inf
        if self._alone is None:
            first = self.likelihood(self.alone(0, short), short, many)
            self._alone = first + float(self.reference[1, 0] + self.reference[0, 1])
        return abs(loss([0, 1, 0]) + self._alone)

    def attempt(self, measure: Callable[[], float]) -> tuple[float, str]:
        """What `measure` finds, and why that is not good enough, if so."""
        try:
            found = measure()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # hybrid, recurrent and missing caches, unknown arguments, each with its own error
            return math.inf, _named(error)
        if found == math.inf:
            return found, "clips of a row hear each other"
        return found, "" if found <= self.allowed else f"it differs by {found:.2g}"

    def scores(self, way: Way) -> float:
        """Largest difference of the scores of both clips in one batch, and of those that a second batch is given."""
        prompts = [prompt.tolist() for prompt in self.prompts if prompt is not self.prompts[0] or self.several]
        answers = [answer.tolist() for answer in self.answers]
        score = Likelihoods(self.model, prompts, answers, self.speech.device, way)
        together = [score(self.speech, self.lengths).sum(-1).cpu() for _ in range(2 if way == "tree" else 1)]
        return max(_largest(scores, self.by_prompt) for scores in together)


def _check_llm(
    model: SpeechLLM,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    speech: Tensor,
    lengths: Tensor,
    wanted: Packing | None,
) -> Checked:
    llm, kernel = base_of(model.llm), model.llm_config._attn_implementation
    reasons, not_chosen = [], ""
    packing: Packing = wanted or "off"
    if packing != "off" and (why := _no_rows(llm)):
        packing = "off"
        reasons.append(why)
    if is_flash(model.llm_config) and (packing == "prefix" or wanted is None):
        llm.set_attn_implementation("sdpa")
        not_chosen = f"{kernel} takes no mask of blocks"
    trial = _Trial(model, prompts, answers, speech, lengths)
    trial.reads_as_it_should()
    while packing != "off" and (why := trial.attempt(partial(trial.loss, packing))[1]):
        reasons.append(f"not {packing}: {why}")
        packing = "rows" if packing == "prefix" else "off"
        if llm.config._attn_implementation != kernel:  # which whole samples can be read by
            llm.set_attn_implementation(kernel)
            not_chosen = ""
            trial = _Trial(model, prompts, answers, speech, lengths)
    difference = trial.hold(trial.loss("off"), "the loss of a padded batch is not that of its clips")
    scored = trial.hold(trial.scores("whole"), "the scores of a batch are not those of its clips")
    model.scores_by, not_scored = "whole", []
    quicker: tuple[Way, ...] = ("cache",) if is_flash(model.llm_config) else ("tree", "cache")
    for way in quicker:
        found, why = trial.attempt(partial(trial.scores, way))
        if not why:
            model.scores_by, scored = way, found
            break
        not_scored.append(f"not by its {way}: {why}")
    return Checked(
        max(difference, scored),
        model.scores_by,
        packing,
        llm.config._attn_implementation,
        "; ".join(not_scored),
        "; ".join(reasons),
        not_chosen,
    )


def _no_rows(llm: PreTrainedModel) -> str:
    """Why an LLM is given no packed rows, whatever two clips of noise say; empty if nothing is known against it."""
    kinds = getattr(llm.config.get_text_config(), "layer_types", None) or ()
    for kind in kinds:
        if any(name in kind for name in _RECURRENT):
            return f"its layers of type {kind} go on from clip to clip"
    # GPT-Neo's looks up which place sees which, and a row may have more places than that knows.
    tables = [
        b.shape[-1] for b in llm.buffers() if b.dtype == torch.bool and b.dim() > 2 and b.shape[-1] == b.shape[-2]
    ]
    return f"its attention is by a table of {min(tables)} places, fewer than a row may have" if tables else ""


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
