"""Whisper, whole: writes down what is said, to know what a recording says and what can be understood of a clip."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import GenerationConfig, WhisperForConditionalGeneration

from mser_dist.audio import SAMPLE_RATE
from mser_dist.errors import UserError
from mser_dist.models import pretrained, sources
from mser_dist.stream.features import Features
from mser_dist.translation.parts import NotMadeError

_SECONDS = 30  # that it hears at once
_LETTERS = 25.0  # tokens a second of speech at most, and some more: without a limit it may repeat itself to its end


class Whisper:
    """Greedy, in windows of 30 s, without times.

    name: of transformers' model: a folder, a hub id, or pypi:whisper-base. Raises `UserError` for what is none.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        source = sources.resolve(name)
        config = pretrained.read_config("transcript.whisper", name, source)
        # Without a generation config of ours the hub would be asked for one, also where the weights are at hand.
        options = {"config": config, "generation_config": GenerationConfig()}
        model = pretrained.load(WhisperForConditionalGeneration, "transcript.whisper", name, source, **options)
        self._model: Any = model.eval().requires_grad_(False).to(device)
        self._device = device
        with pretrained.explained(name, source.path):
            file = Path(source.path) / "tokenizer.json"
            folder = Path(source.path).is_dir()
            self._tokenizer = Tokenizer.from_file(str(file)) if folder else Tokenizer.from_pretrained(source.path)
        self._features = Features(config.num_mel_bins, pad_seconds=_SECONDS)
        self._end: int = self._token("<|endoftext|>", name)
        self._start = [self._token("<|startoftranscript|>", name)]
        self._task = [self._token(word, name) for word in ("<|transcribe|>", "<|notimestamps|>")]
        self._most = int(config.max_target_positions) - 8
        self.about = {"name": "whisper", "model": name, "transformers": version("transformers")}

    def _token(self, word: str, name: str) -> int:
        found = self._tokenizer.token_to_id(word)
        if found is None:
            raise UserError(f"{name}: its tokenizer has no {word}: name a multilingual Whisper")
        return int(found)

    def knows(self, language: str) -> bool:
        return self._tokenizer.token_to_id(f"<|{language.partition('-')[0]}|>") is not None

    def write(self, wave: NDArray[np.float32], language: str) -> str:
        """What is said in [samples] at 16 kHz. Raises `NotMadeError` for a language that it does not know."""
        code = self._tokenizer.token_to_id(f"<|{language.partition('-')[0]}|>")
        if code is None:
            raise NotMadeError(f"Whisper does not know {language}")
        size = _SECONDS * SAMPLE_RATE
        parts = [self._window(wave[begin : begin + size], int(code)) for begin in range(0, len(wave), size)]
        return " ".join(part for part in parts if part)

    @torch.no_grad()
    def _window(self, wave: NDArray[np.float32], language: int) -> str:
        mel = torch.from_numpy(self._features(wave))[None].to(self._device)
        heard = self._model.model.encoder(mel)
        most = min(self._most, 8 + round(_LETTERS * len(wave) / SAMPLE_RATE))
        new, cache, said = [*self._start, language, *self._task], None, list[int]()
        while len(said) < most:
            step = self._model(
                encoder_outputs=heard,
                decoder_input_ids=torch.tensor([new], device=self._device),
                past_key_values=cache,
                use_cache=True,
            )
            logits = step.logits[0, -1]
            logits[self._end + 1 :] = -torch.inf  # of the special tokens, that alone ends it
            token = int(logits.argmax())
            if token == self._end:
                break
            said.append(token)
            new, cache = [token], step.past_key_values
        text: str = self._tokenizer.decode(said)
        return text.strip()
