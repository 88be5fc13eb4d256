"""The frozen text tower: sentences → fixed embeddings, each computed once."""

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from mser_dist.models import sources


class TextTower:
    """A Hugging Face sentence encoder with mean pooling over its tokens (Sentence-BERT, arXiv 1908.10084).

    It is frozen, so it stands outside the training engine, and an embedding once computed is kept.
    """

    def __init__(self, name: str, device: str) -> None:
        source = sources.resolve(name)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source.path)
            model = AutoModel.from_pretrained(source.path, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise sources.explain(name, error) from error
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
            hidden = self._model(**tokens).last_hidden_state  # (n, T, D)
            mask = tokens["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            self._known.update(zip(part, torch.nn.functional.normalize(mean, dim=-1), strict=True))
        return torch.stack([self._known[s] for s in sentences])
