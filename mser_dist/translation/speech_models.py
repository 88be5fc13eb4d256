"""Speech in another language by models of transformers: VITS and MMS-TTS, and SeamlessM4T-v2 from speech to speech."""

from importlib.metadata import version
from typing import Any

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from transformers import AutoProcessor, AutoTokenizer, SeamlessM4Tv2ForSpeechToSpeech, VitsModel

from mser_dist.audio import SAMPLE_RATE
from mser_dist.errors import UserError
from mser_dist.files import digest
from mser_dist.models import pretrained, sources
from mser_dist.translation import languages
from mser_dist.translation.parts import NotMadeError, Source


class Vits:
    """A voice reads the text: nothing of the recording is in it but its words.

    name: a folder or hub id, in which {} stands for the language, {iso3} for its code of three letters, as in
    facebook/mms-tts-{iso3}. Raises `UserError` for a voice that is none, or needs letters other than the language's.
    """

    def __init__(self, name: str, to: list[str], seed: int, device: str) -> None:
        self._seed, self._device = seed, device
        if len(to) > 1 and "{}" not in name and "{iso3}" not in name:
            raise UserError(
                f"speech.model={name} is one voice, for {', '.join(to)}: write {{}} or {{iso3}} where its name has the "
                "language, or ask for one language"
            )
        names = {code: name.replace("{iso3}", languages.three(code)).replace("{}", code) for code in to}
        loaded = {one: self._load(one) for one in sorted(set(names.values()))}
        self._voices = {code: loaded[one] for code, one in names.items()}
        self.about: dict[str, Any] = {
            "name": "vits",
            "model": name,
            "transformers": version("transformers"),
            "seed": seed,
        }

    def _load(self, name: str) -> tuple[Any, Any]:
        source = sources.resolve(name)
        if pretrained.read_config("speech", name, source).model_type != "vits":
            raise UserError(f"speech.model={name} is no VITS: name one, such as facebook/mms-tts-{{iso3}}")
        # Encoders that are of its training alone are not always there.
        model: Any = pretrained.load(VitsModel, "speech", name, source, unused=["posterior_encoder.*"])
        with pretrained.explained(name, source.path):
            tokenizer: Any = AutoTokenizer.from_pretrained(source.path)
        if tokenizer.is_uroman:
            raise UserError(
                f"speech.model={name} reads romanised text (uroman), which is not made here: choose another"
            )
        return model.eval().requires_grad_(False).to(self._device), tokenizer

    def languages(self) -> set[str] | None:
        return set(self._voices)

    @torch.no_grad()
    def speak(self, source: Source, text: str, language: str) -> NDArray[np.float32]:
        """Raises `NotMadeError` for a text of which the voice knows no letter."""
        model, tokenizer = self._voices[language]
        inputs = tokenizer(text, return_tensors="pt").to(self._device)
        if not (inputs["input_ids"] != tokenizer.pad_token_id).any():
            raise NotMadeError(f"no letter that the voice in {language} knows")
        torch.manual_seed(_seed(self._seed, source.id, language))
        wave = model(**inputs).waveform[0].float().cpu().numpy()
        return _resampled(wave, model.config.sampling_rate)


class Seamless:
    """SeamlessM4T-v2 from the recording to speech in the language, in words of its own.

    name: a folder or hub id. Raises `UserError` for another model.
    """

    def __init__(self, name: str, to: list[str], seed: int, device: str) -> None:
        self._seed, self._device = seed, device
        source = sources.resolve(name)
        if pretrained.read_config("speech", name, source).model_type != "seamless_m4t_v2":
            raise UserError(
                f"speech.model={name} is no SeamlessM4T-v2: name one, such as facebook/seamless-m4t-v2-large"
            )
        model = pretrained.load(SeamlessM4Tv2ForSpeechToSpeech, "speech", name, source, unused=["text_encoder.*"])
        self._model: Any = model.eval().requires_grad_(False).to(device)
        with pretrained.explained(name, source.path):
            self._processor: Any = AutoProcessor.from_pretrained(source.path)
        self._codes = self._model.generation_config.vocoder_lang_code_to_id
        self.said = ""
        self.about: dict[str, Any] = {
            "name": "seamless",
            "model": name,
            "transformers": version("transformers"),
            "seed": seed,
        }

    def languages(self) -> set[str] | None:
        return {code for code in languages.known() if languages.among(code, self._codes)}

    @torch.no_grad()
    def speak(self, source: Source, text: str, language: str) -> NDArray[np.float32]:
        """Raises `NotMadeError` where the model has no words. What it says is in `said`."""
        inputs = self._processor(audio=source.audio, sampling_rate=SAMPLE_RATE, return_tensors="pt").to(self._device)
        torch.manual_seed(_seed(self._seed, source.id, language))
        made = self._model.generate(
            **inputs, tgt_lang=languages.among(language, self._codes), return_intermediate_token_ids=True
        )
        self.said = self._processor.tokenizer.decode(made.sequences[0], skip_special_tokens=True).strip()
        size = int(made.waveform_lengths.reshape(-1)[0])
        if not self.said or not size:
            raise NotMadeError("no words came of the recording")
        wave = made.waveform.reshape(-1)[:size].float().cpu().numpy()
        return _resampled(wave, self._model.config.sampling_rate)


def _seed(seed: int, key: str, language: str) -> int:
    """A clip's own, so that it is the same whatever was made before it."""
    return int(digest([seed, key, language])[:12], 16)


def _resampled(wave: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    made: NDArray[np.float32] = soxr.resample(wave, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else wave
    return made
