"""An encoder that is not trained: whole on every rank, beside the model that is, and fed one clip at a time."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from mser_dist import deepspeed_parts
from mser_dist.models.encoder import Encoder
from mser_dist.models.encoders import encoder_config

_NOT_OF_THE_MODEL = ("transformers_version", "dtype", "torch_dtype", "architectures")  # of who wrote the config


class FrozenEncoder:
    """What it makes of a clip is a function of the clip alone, to the last bit: so it can be kept, and used again.

    It is no part of the model that DeepSpeed trains: nothing of it is partitioned, and no forward pass of it is
    collective. A checkpoint does not hold it; `sha256` says which one it was.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder.requires_grad_(False).eval()
        self._sha256: str | None = None

    def to(self, device: str, dtype: torch.dtype | None = None) -> "FrozenEncoder":
        """Move it, in place; parameters to `dtype`, while buffers stay as they are."""
        self._sha256 = None
        for parameter in self.encoder.parameters():
            parameter.data = parameter.data.to(dtype or parameter.dtype)
        self.encoder.to(device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    @torch.no_grad()
    def __call__(self, speech: Tensor, lengths: Tensor) -> list[Tensor]:
        """(B, n_mels, F) log-mel or (B, S) waveform and (B,) own lengths → features of each clip, (T_i, L, D)."""
        fed = self.encoder.fed(lengths).tolist()
        device = next(self.encoder.parameters()).device
        # A copy of each: what lies behind a clip in its batch would decide its alignment, and that the last bits.
        with deepspeed_parts.plain_linear():
            return [
                self.encoder(speech[i : i + 1, ..., :size].clone().to(device), lengths[i : i + 1].to(device))[0][0]
                for i, size in enumerate(fed)
            ]

    def sha256(self) -> str:
        """Of the weights, in their dtype, and of what the config makes of them. Computed once: they do not change."""
        if self._sha256 is not None:
            return self._sha256
        fields: dict[str, Any] = encoder_config(self.encoder).to_dict()
        config = {k: v for k, v in fields.items() if not k.startswith("_") and k not in _NOT_OF_THE_MODEL}
        digest = hashlib.sha256(json.dumps([self.encoder.settings(), config], sort_keys=True).encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._sha256 = digest.hexdigest()
        return self._sha256
