"""One loader in a process of its own, told what to do by lines of JSON on its standard input.

    python -m tools.stream_peers.worker MODULE FEATURES

MODULE is one beside this file. It has `opened(folder)`, which opens the clips there and returns a function that starts
a pass over them, (key, float32 [samples] at 16 kHz) each, and, where the format is its own, `write(files, folder)`.
FEATURES: how the log-mel is made, one of `EXTRACTORS`.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.stream_peers.common import Wave

BATCH = 16
HOP, HALF_WINDOW = 160, 200  # samples

Mel = NDArray[np.float32]  # [80, frames]
Extract = Callable[[list[Wave]], NDArray[np.float32]]  # B waves -> log-mels (B, 80, frames)


def _padded(mels: list[Mel]) -> NDArray[np.float32]:
    """(B, 80, frames of the longest), zeros behind the shorter ones."""
    batch = np.zeros((len(mels), mels[0].shape[0], max(mel.shape[1] for mel in mels)), dtype=np.float32)
    for row, mel in zip(batch, mels, strict=True):
        row[:, : mel.shape[1]] = mel
    return batch


def _ours() -> Extract:
    from mser_dist.stream.features import Features

    features = Features()
    return lambda waves: _padded([features(wave) for wave in waves])


def _transformers(padding: str, one_by_one: bool) -> Extract:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor()

    def mel(waves: list[Wave]) -> NDArray[np.float32]:
        done = extractor(waves, sampling_rate=16_000, padding=padding, return_tensors="np")
        return done.input_features

    return (lambda waves: _padded([mel([wave])[0] for wave in waves])) if one_by_one else mel


EXTRACTORS: dict[str, Callable[[], Extract]] = {
    "ours": _ours,
    "longest": lambda: _transformers("longest", one_by_one=True),
    "longest of 16": lambda: _transformers("longest", one_by_one=False),
    "30s": lambda: _transformers("max_length", one_by_one=False),
}


class Worker:
    def __init__(self, module: str, features: str) -> None:
        import torch

        torch.set_num_threads(1)
        self.module = importlib.import_module(f"tools.stream_peers.{module}")
        self.extract = EXTRACTORS[features]()
        self._open: dict[str, Callable[[], Iterator[tuple[str, Wave]]]] = {}

    def clips(self, folder: str) -> Iterator[tuple[str, Wave]]:
        if folder not in self._open:
            self._open[folder] = self.module.opened(Path(folder))
        return iter(self._open[folder]())

    def batches(self, folder: str) -> Iterator[tuple[list[str], Any]]:
        """Keys, and log-mels zero-padded to one length, a tensor (16, 80, frames)."""
        import torch

        clips = self.clips(folder)
        while batch := list(islice(clips, BATCH)):
            yield [key for key, _ in batch], torch.from_numpy(self.extract([wave for _, wave in batch]))

    # What follows are the commands; each returns its answer.

    def write(self, files: list[str], folder: str) -> dict[str, Any]:
        self.module.write([Path(file) for file in files], Path(folder))
        return {}

    def versions(self, packages: list[str]) -> dict[str, Any]:
        found = {}
        for package in packages:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "none"
        return found

    def keep(self, folder: str, to: str) -> dict[str, Any]:
        """Write every clip's log-mel, without padding, into the folder `to`, for `compare`."""
        for key, wave in self.clips(folder):
            np.save(Path(to) / f"{key}.npy", self.extract([wave])[0])
        return {}

    def compare(self, folder: str, to: str) -> dict[str, Any]:
        """The largest difference to the log-mels that `keep` wrote, where no padding reaches.

        Raises ValueError unless the clips are the same.
        """
        keys, worst = [], 0.0
        for names, mels in self.batches(folder):
            keys += names
            for key, mel in zip(names, mels, strict=True):
                expected = np.load(Path(to) / f"{key}.npy")  # (80, frames)
                inner = expected.shape[1] - (HALF_WINDOW // HOP + 1)  # the windows before reach no padding
                worst = max(worst, float(np.abs(mel[:, :inner].numpy() - expected[:, :inner]).max(initial=0.0)))
        if sorted(keys) != sorted(file.stem for file in Path(to).glob("*.npy")):
            raise ValueError(f"{len(keys)} clips, not the same as ours")
        return {"max_difference": worst}

    def time(self, folder: str, mel: bool) -> dict[str, Any]:
        """CPU and wall seconds of a pass to log-mel batches, or only to waveforms, and how many clips it gave.

        The loaders run in this process and its threads, so its CPU time is all.
        """
        began, cpu_began = time.perf_counter(), time.process_time()
        count = sum(len(keys) for keys, _ in self.batches(folder)) if mel else sum(1 for _ in self.clips(folder))
        return {"clips": count, "cpu_s": time.process_time() - cpu_began, "wall_s": time.perf_counter() - began}


def main() -> None:
    # A loader may print: only answers go to what was standard output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        try:
            worker = worker or Worker(*sys.argv[1:])
            command = json.loads(line)
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:  # a peer's failure is a row of the table, whatever it is
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
