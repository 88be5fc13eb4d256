"""openSMILE's eGeMAPS functionals, 88 numbers a clip, in the place of what a frozen encoder hears.

The extended Geneva Minimalistic Acoustic Parameter Set (Eyben et al., 2016, doi 10.1109/TAFFC.2015.2457417), v02. The
package `opensmile` is an optional extra: audEERING licenses it for private use, research and education alone.
"""

import hashlib
import importlib.util
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mser_dist.audio import SAMPLE_RATE
from mser_dist.models.encoder import Encoder
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.stream.features import Features

INSTALL = "pip install 'mser-dist[opensmile]'"
LICENCE = "openSMILE is licensed for private use, research and education alone (audEERING's licence)"
WIDTH = 88


def is_installed() -> bool:
    """Whether there is an openSMILE to ask."""
    return importlib.util.find_spec("opensmile") is not None


class Egemaps(FrozenEncoder):
    """What `encode_once` takes for a frozen encoder: T = 1, L = 1, D = 88.

    The data workers compute them (`Functionals`); called with them, this gives them their shape.
    """

    dtype = torch.float32

    def __init__(self) -> None:
        import opensmile  # here, so that the workers that are forked have it

        self.encoder = _Shape()
        self._version = opensmile.__version__

    def __call__(self, speech: Tensor, lengths: Tensor) -> list[Tensor]:
        """(B, 88) → (1, 1, 88) of each clip."""
        return list(speech.view(-1, 1, 1, WIDTH))

    def sha256(self) -> str:
        """Of what decides them: the set's name and openSMILE's version."""
        return hashlib.sha256(f"eGeMAPSv02 functionals {self._version}".encode()).hexdigest()


@dataclass(frozen=True)
class Functionals(Features):
    """Waveform → (88,) functionals of the whole clip. One that openSMILE cannot tell (of silence) is 0."""

    n_mels: int | None = None

    def __call__(self, wave: NDArray[np.float32]) -> NDArray[np.float32]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a clip shorter than its longest window
            found = _smile().process_signal(wave, SAMPLE_RATE).to_numpy(np.float32)[0]
        return np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)

    def own(self, samples: int) -> int:
        return WIDTH


@cache
def _smile() -> Any:
    """openSMILE of this process."""
    import opensmile

    return opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals)


class _Shape(Encoder):
    """Of the functionals, as an encoder of one layer."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.stride = 10**6  # one frame, however long the clip is

    @property
    def width(self) -> int:
        return WIDTH

    @property
    def features(self) -> Features:
        return Functionals()

    def cut(self, highest: int) -> None:
        """There are none above."""

    def frames(self, lengths: Tensor) -> Tensor:
        return torch.ones_like(lengths)

    def hidden(self, speech: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        return [speech[:, None]], torch.ones(len(speech), dtype=torch.long)
