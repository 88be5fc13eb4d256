"""A trained model as a user has it: recordings in, labels and their probabilities out.

model = mser_dist.load_model("runs/demo/stage2")
print(model.predict("x.wav").label)
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mser_dist.audio import SAMPLE_RATE
from mser_dist.errors import UserError
from mser_dist.evaluation.scoring import AnswerScorer, PromptScorer
from mser_dist.models import chat, exported
from mser_dist.models.attention import choose
from mser_dist.models.chat import ChatPrompt
from mser_dist.models.normalize import OVERALL, shrunk
from mser_dist.models.self_check import check_llm
from mser_dist.models.text import TextTower
from mser_dist.prediction.locate import find_export
from mser_dist.prediction.recordings import as_wave, decode, listed
from mser_dist.prediction.windows import Windows, together
from mser_dist.stream.examples import pad_speech
from mser_dist.stream.loader import Example

MAX_SECONDS = 30.0  # a window's default, of exports that do not say on how long clips they were trained
ADAPTED = "these recordings"  # the group of statistics that `adapt` makes

Wave = NDArray[np.float32]  # [samples] at 16 kHz


class Piece(NamedTuple):
    """A window of a recording; the corpus that it is of (`models.normalize.corpora_of`), where one is known."""

    wave: Wave
    corpus: str = ""


@dataclass(frozen=True)
class Window:
    """What is heard from `begin` to `end`, in seconds: probabilities by label, the likeliest first."""

    begin: float
    end: float
    probabilities: dict[str, float]

    @property
    def label(self) -> str:
        return next(iter(self.probabilities))


@dataclass(frozen=True)
class Prediction:
    """A recording's probabilities by label, the likeliest first; its length in seconds; its windows, in order of time.

    A recording no longer than a window has one.
    """

    probabilities: dict[str, float]
    seconds: float
    timeline: tuple[Window, ...]

    @property
    def label(self) -> str:
        """The likeliest."""
        return next(iter(self.probabilities))


def load_model(model: str | Path, *, device: str | None = None, dtype: str = "float32") -> "Model":
    """A trained model, of either stage, to be asked about recordings.

    Args:
        model: a run folder, an export, or of MLflow ``models:/name@alias`` or ``runs:/id``.
        device: cpu, cuda or cuda:1 …; default: a GPU if there is one.
        dtype: what it computes in: float32, bfloat16 or float16.

    Raises `UserError` for what is no model, or damaged.
    """
    return Model(find_export(model), device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)


class Model:
    """Use `load_model`. `labels` are those that it was trained on; any other words can be asked for too."""

    def __init__(self, export: Path, device: str, dtype: str, *, mapped: bool = False) -> None:
        """mapped: as of `models.exported.load_speech`."""
        kind = getattr(torch, dtype)
        _check_device(device)
        attention = choose("auto", kind, torch.device(device).type)
        self.export, self.device = export, device
        self.card = card = exported.read_card(export)
        self.stage: int = card["stage"]
        self.labels: list[str] = card["labels"]
        self.features = exported.features_of(card)
        self.network: Any
        self._scorers: dict[tuple[str, ...], Any] = {}
        self._tower: TextTower | None = None
        if self.stage == 1:
            self.network = exported.load_aligner(export, attention, kind, mapped=mapped).to(device)
        else:
            self.network, self._tokenizer = exported.load_speech_llm(export, attention, kind, mapped=mapped)
            kept = card.get("prompt")  # exports of 0.1.0 keep none
            self._prompt = ChatPrompt(**kept) if kept else chat.render(self._tokenizer, "speech_first")
            self.network.to(device)
        self.network.requires_grad_(False)
        if self.speech.frozen is not None:
            self.speech.frozen.to(device)
        self._trained = self.speech.statistics

    @property
    def speech(self) -> Any:
        """Its encoder and Q-Former, a `models.speech.SpeechModel`."""
        return self.network.speech

    @property
    def window(self) -> float:
        """Seconds of the longest clip that it was trained on, as far as its export tells; longer recordings are cut."""
        limit = getattr(self.speech.any_encoder, "max_frames", None)  # Whisper's; the others have none
        longest = float(self.card.get("max_seconds", MAX_SECONDS))
        return min(longest, limit / 100) if limit else longest

    def windows(self, window: float | None = None, hop: float | None = None) -> Windows:
        """How recordings are cut: by default into windows of `self.window` seconds, one behind the other."""
        size = self.window if window is None else window
        limit = getattr(self.speech.any_encoder, "max_frames", None)
        if limit and size > limit / 100:
            raise UserError(f"window={size:g}: the encoder hears {limit / 100:g} s at most")
        return Windows(size, size if hop is None else hop)

    # ---- what a user asks for

    def predict(
        self,
        recordings: Any,
        *,
        labels: Sequence[str] | None = None,
        sampling_rate: int | None = None,
        window: float | None = None,
        hop: float | None = None,
        batch: int = 8,
    ) -> Any:
        """The `Prediction` of a recording, or a list of them of a list.

        Args:
            recordings: a path, an audio file's bytes, an array or tensor [samples] or with channels; or a list.
            labels: any words; default: those of the training.
            sampling_rate: of arrays, in Hz.
            window, hop: seconds; a longer recording is cut into windows, and the answer is their mean over time.
            batch: windows a forward pass.

        Raises `UserError` for what cannot be read, and for labels that cannot be asked for.
        """
        wanted = self.check_labels(labels)
        cut = self.windows(window, hop)
        [many, waves] = _waves(recordings, sampling_rate)
        places = [(number, place) for number, wave in enumerate(waves) for place in cut.cut(len(wave))]
        pieces = (Piece(waves[number][begin:end]) for number, (begin, end) in places)
        found = np.concatenate([*self.probabilities(pieces, wanted, batch)])
        predictions = []
        for number, wave in enumerate(waves):
            mine = [i for i, (owner, _) in enumerate(places) if owner == number]
            predictions.append(gathered([places[i][1] for i in mine], found[mine], wanted, len(wave)))
        return predictions if many else predictions[0]

    @torch.no_grad()
    def embed(
        self,
        recordings: Any,
        *,
        sampling_rate: int | None = None,
        window: float | None = None,
        hop: float | None = None,
        batch: int = 8,
    ) -> NDArray[np.float32]:
        """(D,) of a recording, (n, D) of a list. Stage 1: its place among the captions, of unit length; stage 2: the
        mean of its emotion tokens. Of a longer recording the mean over its windows. Arguments as of `predict`.
        """
        cut = self.windows(window, hop)
        [many, waves] = _waves(recordings, sampling_rate)
        places = [(number, place) for number, wave in enumerate(waves) for place in cut.cut(len(wave))]
        parts = []
        for inputs in self._batches((Piece(waves[number][begin:end]) for number, (begin, end) in places), batch):
            speech, lengths = inputs["speech"], inputs["lengths"]
            if self.stage == 1:
                vectors = self.network.embed_speech(speech, lengths)
            else:
                vectors = self.speech(speech, lengths).mean(1)
            parts.append(vectors.float().cpu().numpy())
        rows = np.concatenate(parts).astype(np.float64)
        owner = np.array([number for number, _ in places])
        spans = [(begin / SAMPLE_RATE, end / SAMPLE_RATE) for _, (begin, end) in places]
        mine = [np.flatnonzero(owner == number) for number in range(len(waves))]
        found = np.stack([together([spans[i] for i in own], rows[own]) for own in mine])
        if self.stage == 1:
            found /= np.linalg.norm(found, axis=1, keepdims=True)
        result: NDArray[np.float32] = found.astype(np.float32)
        return result if many else result[0]

    def adapt_to(self, pieces: Iterable[Piece], *, batch: int = 8) -> int:
        """`adapt` to these pieces; returns of how many."""
        self.check_adaptable()
        assert self._trained is not None
        layers, width = self._trained.mean.shape[1:]
        sums, count = np.zeros((2, 1, layers, width)), 0
        for clip in self._heard(pieces, batch):
            x = clip.double().cpu()
            sums[0, 0] += x.mean(0).numpy()
            sums[1, 0] += x.square().mean(0).numpy()
            count += 1
        if not count:
            raise UserError("there is no recording to adapt to")
        mean, square = sums / count
        self.speech.statistics = shrunk("corpus", [ADAPTED], np.array([count]), mean, square, self._trained)
        return count

    def adapt(self, recordings: Any, *, sampling_rate: int | None = None) -> None:
        """Normalise from now on by how these recordings sound on the whole; no labels are needed. Few of them are drawn
        to what training knows (`models.normalize.shrunk`).

        Raises `UserError` for a model whose features are not normalised.
        """
        cut = self.windows()
        [_, waves] = _waves(recordings, sampling_rate)
        self.adapt_to(Piece(wave[begin:end]) for wave in waves for begin, end in cut.cut(len(wave)))

    def check_adaptable(self) -> None:
        """Raise `UserError` for a model whose features are not normalised."""
        if self._trained is None or self.speech.frozen is None:
            raise UserError(
                f"{self.export}: this model cannot be adapted to recordings: its features are not normalised "
                "(encoder.normalize=none in its training); leave out --adapt"
            )

    # ---- what a command is made of

    def check_labels(self, labels: Sequence[str] | None) -> list[str]:
        """The labels to choose from. Raises `UserError` for none, one that comes twice, and what is no word."""
        if labels is None:
            return self.labels
        if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
            raise UserError(f"labels={labels!r}: give a list of words")
        found = [" ".join(label.split()) for label in labels]
        if not found or not all(found):
            raise UserError("labels names no word: give at least one")
        if twice := [label for label in found if found.count(label) > 1]:
            raise UserError(f"labels names {twice[0]!r} twice")
        return found

    def probabilities(
        self, pieces: Iterable[Piece], labels: Sequence[str], batch: int = 8
    ) -> Iterator[NDArray[np.float64]]:
        """(b, K) of each batch of windows, in order: a softmax over the labels' scores, calibrated if the export is."""
        scorer = self.scorer(labels)
        scale = scorer.scale()
        for inputs in self._batches(pieces, batch):
            scores: Tensor = scorer(inputs)["scores"].double().cpu() * scale / self.temperature
            yield scores.softmax(-1).numpy()

    @property
    def temperature(self) -> float:
        """That the export was calibrated with: 1 if it was not."""
        return float(self.card.get("temperature") or 1.0)

    def _group(self, corpus: str) -> int:
        """The number of the statistics' group of a piece."""
        names = list(self.speech.statistics.clips)
        return names.index(next(name for name in (ADAPTED, corpus, OVERALL) if name in names))

    def scorer(self, labels: Sequence[str]) -> Any:
        """What scores these labels: one of `evaluation.scoring`."""
        key = tuple(labels)
        if key not in self._scorers:
            self._scorers.clear()  # who asks for other words at each call does not fill the memory
            self._scorers[key] = self._new_scorer([*labels])
        return self._scorers[key]

    def _new_scorer(self, labels: list[str]) -> PromptScorer | AnswerScorer:
        if self.stage == 1:
            self._tower = self._tower or TextTower(self.card["text"], self.device)
            return PromptScorer(self.network, self._tower, labels, self.card.get("captions"))
        scorer = AnswerScorer(self.network, self._tokenizer, self._prompt, labels)
        if self.network.scores_by == "whole":  # the check finds whether a prompt need be read once only, for all labels
            check_llm(self.network, scorer.prompts, scorer.answers, self.device)
        return scorer

    def _padded(self, pieces: Iterable[Piece], batch: int) -> Iterator[dict[str, Any]]:
        """Batches as an encoder is fed them."""
        several = iter(pieces)
        while some := [*islice(several, batch)]:
            clips = [
                Example(self.features(piece.wave), self.features.own(len(piece.wave)), 0, 0, number, _NO_DRAW)
                for number, piece in enumerate(some)
            ]
            inputs = pad_speech(clips)
            if self.speech.statistics is not None:
                inputs["group"] = torch.tensor([self._group(piece.corpus) for piece in some])
            yield inputs

    @torch.no_grad()
    def _heard(self, pieces: Iterable[Piece], batch: int) -> Iterator[Tensor]:
        """What the frozen encoder makes of each, (T, L, D)."""
        for inputs in self._padded(pieces, batch):
            yield from self.speech.frozen(inputs["speech"], inputs["lengths"])

    def _batches(self, pieces: Iterable[Piece], batch: int) -> Iterator[dict[str, Any]]:
        """Batches as the network takes them."""
        for inputs in self._padded(pieces, batch):
            yield self.speech.prepared(inputs, self.device)


_NO_DRAW = np.random.default_rng(0)  # nothing is drawn for a clip that is only listened to


def gathered(
    places: Sequence[tuple[int, int]], probabilities: NDArray[np.float64], labels: Sequence[str], samples: int
) -> Prediction:
    """The prediction of a recording of so many samples from its windows' [begin, end) and probabilities (W, K)."""
    spans = [(begin / SAMPLE_RATE, end / SAMPLE_RATE) for begin, end in places]
    timeline = tuple(Window(*span, _ranked(row, labels)) for span, row in zip(spans, probabilities, strict=True))
    return Prediction(_ranked(together(spans, probabilities), labels), samples / SAMPLE_RATE, timeline)


def _ranked(row: NDArray[np.float64], labels: Sequence[str]) -> dict[str, float]:
    return {labels[i]: float(row[i]) for i in np.argsort(-row, kind="stable")}


def _waves(recordings: Any, sampling_rate: int | None) -> tuple[bool, list[Wave]]:
    """Whether there are several, and each at 16 kHz."""
    many = isinstance(recordings, (list, tuple))
    given = list(recordings) if many else [recordings]
    if many and given and all(isinstance(one, (int, float)) for one in given):
        many, given = False, [np.array(given, dtype=np.float32)]  # samples as a list
    if not given:
        raise UserError("there is no recording: the list is empty")
    return many, [_wave(one, sampling_rate) for one in given]


def _wave(one: Any, sampling_rate: int | None) -> Wave:
    if isinstance(one, (str, Path)):
        [recording, *others] = listed([str(one)])
        if others:
            raise UserError(f"{one} holds several recordings: give mser predict the folder, or the model each file")
        try:
            return recording.read()
        except UserError as error:
            raise UserError(f"{recording.name}: {error}") from None
    if isinstance(one, (bytes, bytearray, memoryview)):
        return decode(bytes(one))
    return as_wave(one, sampling_rate)


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0][:160]
        raise UserError(
            f"device={device} cannot be used ({said}): name cpu, cuda, or cuda:1 for a second GPU"
        ) from None
