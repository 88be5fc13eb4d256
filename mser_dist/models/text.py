"""The frozen text tower: sentences → fixed embeddings, each computed once."""

from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, AutoModel, AutoTokenizer

from mser_dist import deepspeed_parts
from mser_dist.errors import UserError
from mser_dist.models import pretrained, sources


class TextTower:
    """A Hugging Face sentence encoder with mean pooling over its tokens (Sentence-BERT, arXiv 1908.10084).

    It is frozen, so it stands outside the training engine, and an embedding once computed is kept.
    """

    def __init__(self, name: str, device: str) -> None:
        source = sources.resolve(name)
        _check_kind(pretrained.read_config("text", name, source), name)
        with pretrained.explained(name, source.path):
            self._tokenizer = AutoTokenizer.from_pretrained(source.path)
        if self._tokenizer.pad_token is None:  # what stands there is masked
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._tokenizer.pad_token is None:
            raise UserError(
                f"text.pretrained={name}: its tokenizer has no pad token: set pad_token in its tokenizer_config.json"
            )
        # The mean over the tokens stands for a sentence: a pooler is not used, and often not there.
        model = pretrained.load(AutoModel, "text", name, source, unused=["pooler.*"])
        self._model = model.to(device).eval().requires_grad_(False)
        self._known: dict[str, Tensor] = {}
        self.name = name
        self.device = device
        self.width = int(model.config.hidden_size)

    @torch.no_grad()
    def embed(self, sentences: list[str]) -> Tensor:
        """(n, width) embeddings of unit length, fp32, on the tower's device."""
        new = [s for s in dict.fromkeys(sentences) if s not in self._known]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            tokens = self._tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(self.device)
            with deepspeed_parts.plain_linear():  # the same bits in a process that has trained before
                hidden = self._model(**tokens).last_hidden_state  # (n, T, D)
            mask = tokens["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            self._known.update(zip(part, torch.nn.functional.normalize(mean, dim=-1), strict=True))
        return torch.stack([self._known[s] for s in sentences])


def _check_kind(config: Any, name: str) -> None:
    both = config.is_encoder_decoder or type(config)().is_encoder_decoder  # T5's encoder alone says no of itself
    if both or config.sub_configs or type(config) not in MODEL_MAPPING:
        raise UserError(
            f"text.pretrained={name} is a model of type {config.model_type}: name an encoder of text alone, such as "
            "BERT, XLM-RoBERTa, MPNet or a sentence encoder made of one (no encoder-decoder, none that sees images)"
        )
