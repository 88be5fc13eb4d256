"""What every speech encoder has: which of its layers are used, over how many frames they are averaged, and padding."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mser_dist.errors import UserError
from mser_dist.stream.features import Features


class Encoder(nn.Module, ABC):
    """A speech encoder that gives the hidden states of some of its layers, over the frames of each clip alone.

    layers: which hidden states: 0 is what the first layer is given, n what the n-th makes of it; the last one has the
        encoder's final norm on it, if it has one. Those above the highest are not there, so not computed.
    depth: how many layers the whole encoder has, those that are not there included.
    stride: so many frames are averaged into one.
    pad_seconds: clips come with silence behind them up to this length. The encoder attends to it, as Whisper was
        trained, and its frames are not given on.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.layers: tuple[int, ...] = (depth,)
        self.stride = 1
        self.pad_seconds: float | None = None

    def use(self, layers: Sequence[int], depth: int) -> None:
        """Give these hidden states of an encoder that has, or had, `depth` layers.

        Raises `UserError` for a layer that it has not.
        """
        for number in layers:
            if not 0 <= number <= depth:
                raise UserError(
                    f"encoder.layers names {number}, and the encoder has {depth} layers: use numbers from 0 (what the "
                    f"first is given) to {depth}, last or all"
                )
        self.layers, self.depth = tuple(layers), depth
        self.cut(max(layers))

    @property
    @abstractmethod
    def width(self) -> int:
        """Of a hidden state: D."""

    @property
    @abstractmethod
    def features(self) -> Features:
        """What it is fed."""

    @abstractmethod
    def cut(self, highest: int) -> None:
        """Drop the layers above `highest`, and the final norm where the last layer is among them."""

    @abstractmethod
    def hidden(self, speech: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        """The hidden states of `layers`, (B, T, D) each, and the number of each clip's own frames, (B,)."""

    @abstractmethod
    def frames(self, lengths: Tensor) -> Tensor:
        """(B,) frames of a hidden state, of clips of so many mel frames or samples."""

    def fed(self, lengths: Tensor) -> Tensor:
        """(B,) mel frames or samples that the encoder attends to, of clips with so many of their own."""
        if self.pad_seconds is None:
            return lengths
        return lengths.clamp(min=self.features.size(self.pad_seconds))

    def settings(self) -> dict[str, Any]:
        """All that decides, beside the weights, what a clip's features are; JSON."""
        return {
            "class": type(self).__name__,
            **asdict(self.features),
            "layers": list(self.layers),
            "depth": self.depth,
            "stride": self.stride,
        }

    def forward(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n_mels, F) log-mel or (B, S) waveform, and (B,) mel frames or samples that are the clips' own.

        Returns (B, T, L, D) features of L layers and the (B, T) mask of each clip's frames.
        """
        with _one_precision():
            states, frames = self.hidden(speech, lengths)
        x = torch.stack(states, 2)  # (B, T, L, D)
        if self.pad_seconds is not None:  # else the longest clip fills the batch, and a GPU need not be waited for
            x = x[:, : int(frames.max())]
        mask = torch.arange(x.shape[1], device=x.device) < frames[:, None]
        return (x, mask) if self.stride == 1 else _averaged(x, frames, self.stride)


@contextmanager
def _one_precision() -> Iterator[None]:
    """Convolutions are computed as matrices are. By torch's default a GPU rounds what goes into those of float32 to the
    10 bits of TF32, and into products of matrices not: the same weights would say something else there than on a CPU.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _averaged(x: Tensor, frames: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """(B, T, L, D) with `stride` neighbours averaged into one; a clip's last ones are fewer where it ends between."""
    batch, length, layers, width = x.shape
    steps = -(-length // stride)
    mask = torch.arange(steps * stride, device=x.device) < frames[:, None]  # (B, T')
    x = nn.functional.pad(x, (0, 0, 0, 0, 0, steps * stride - length))
    x = x * mask[:, :, None, None]
    counts = mask.view(batch, steps, stride).sum(2)  # (B, T' / stride)
    sums = x.view(batch, steps, stride, layers, width).sum(2)
    return sums / counts.clamp(min=1)[:, :, None, None], counts > 0
