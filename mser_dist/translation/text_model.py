"""Text in another language by a translation model of transformers: NLLB, M2M-100, SeamlessM4T."""

from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, SeamlessM4TForTextToText, SeamlessM4Tv2ForTextToText

from mser_dist.errors import UserError
from mser_dist.models import pretrained, sources
from mser_dist.translation import languages
from mser_dist.translation.parts import NotMadeError, Sentence, Source

_CLASSES = {
    "m2m_100": AutoModelForSeq2SeqLM,  # M2M-100 and NLLB
    "seamless_m4t": SeamlessM4TForTextToText,
    "seamless_m4t_v2": SeamlessM4Tv2ForTextToText,
}
_UNUSED = ("speech_encoder.*", "t2u_model.*", "vocoder.*")  # of a whole SeamlessM4T


class TextModel:
    """By beam search, a sentence at a time, so that each depends on itself alone.

    name: a folder or hub id. Raises `UserError` for another kind of model.
    """

    def __init__(self, name: str, beams: int, max_tokens: int, device: str) -> None:
        source = sources.resolve(name)
        config = pretrained.read_config("text", name, source)
        if config.model_type not in _CLASSES:
            raise UserError(f"text.model={name} is a {config.model_type}: name one of type {', '.join(_CLASSES)}")
        model = pretrained.load(_CLASSES[config.model_type], "text", name, source, unused=_UNUSED)
        self._model: Any = model.eval().requires_grad_(False).to(device)
        with pretrained.explained(name, source.path):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source.path)
        self._names = set(self._tokenizer.get_vocab())
        self._seamless = config.model_type.startswith("seamless")
        self._options = {"num_beams": beams, "max_new_tokens": max_tokens, "do_sample": False}
        self.about: dict[str, Any] = {
            "name": "model",
            "model": name,
            "type": config.model_type,
            "transformers": version("transformers"),
            "beams": beams,
            "max_tokens": max_tokens,
        }

    def languages(self) -> set[str] | None:
        return {code for code in languages.known() if languages.among(code, self._names)}

    @torch.no_grad()
    def sentence(self, source: Source, language: str) -> Sentence:
        """Raises `NotMadeError`: no transcript, a language that the model does not know, or nothing came of it."""
        if not source.text:
            raise NotMadeError("no transcript")
        there, here = self._name(source.language), self._name(language)
        self._tokenizer.src_lang = there.strip("_")
        inputs = self._tokenizer(source.text, return_tensors="pt").to(self._model.device)
        if self._seamless:
            tokens = self._model.generate(**inputs, tgt_lang=here.strip("_"), **self._options)
        else:
            begin = self._tokenizer.convert_tokens_to_ids(here)
            tokens = self._model.generate(**inputs, forced_bos_token_id=begin, **self._options)
        if self._tokenizer.eos_token_id not in tokens[0][1:]:
            raise NotMadeError("its translation is longer than text.max_tokens")
        text = self._tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
        if not any(letter.isalnum() for letter in text):
            raise NotMadeError(f"no words in {language} came of its text")
        return Sentence(text)

    def _name(self, language: str) -> str:
        found = languages.among(language, self._names)
        if found is None:
            raise NotMadeError(f"the translation model does not know {language}")
        return found
