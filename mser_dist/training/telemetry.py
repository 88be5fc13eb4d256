"""What a step costs: tokens, padding, operations, time and memory, counted on each rank and told of all together."""

import resource
import sys
from typing import Any

import numpy as np
import torch

from mser_dist.models.flops import Flops
from mser_dist.ranks import distributed
from mser_dist.training.peaks import peak
from mser_dist.training.setup import Run


class Telemetry:
    """Counts this rank's steps since the last reading, from shapes that are on the CPU: no GPU is waited for."""

    def __init__(self, run: Run) -> None:
        self._run = run
        engine = run.config.engine
        self._peak = peak(run.device, engine.dtype, engine.peak_tflops)
        self._reset()

    def _reset(self) -> None:
        self._steps, self._audio, self._tokens, self._computed, self._flops = 0, 0.0, 0.0, 0.0, Flops()

    def step(self, batches: list[dict[str, Any]]) -> None:
        """A step over these micro-batches is done."""
        self._steps += 1
        for batch, load in zip(batches, self._run.stage.loads(batches), strict=True):
            self._audio += float(self._run.examples.shards.duration[np.array(batch["index"])].sum())
            self._tokens += load.tokens
            self._computed += load.computed
            self._flops += load.flops

    def sums(self) -> dict[str, float]:
        """This rank's numbers, whose means over the ranks `read` is given; counting begins anew."""
        times = {f"time_{name}": seconds / self._steps for name, seconds in self._run.engine.timer.read().items()}
        found = {
            "audio": self._audio,
            "tokens": self._tokens,
            "computed": self._computed,
            "model": self._flops.model,
            "hardware": self._flops.hardware,
            **times,
        }
        self._reset()
        return found

    def read(self, mean: dict[str, float], rates: dict[str, float], seconds: float, steps: int) -> dict[str, float]:
        """What is logged of `steps` steps in so many seconds: rates of all ranks together, shares and times of one.

        mean: of `sums` over the ranks; rates: of the clock. Collective: memory is that of the rank with most.
        """
        ranks = self._run.world.world_size
        found = {
            "audio_seconds_per_second": mean["audio"] * ranks / seconds,
            "padding": 1 - mean["tokens"] / max(mean["computed"], 1.0),
            "tflops": mean["hardware"] / seconds / 1e12,
            "peak_memory_gib": distributed.most([_peak_memory(self._run.device)])[0] / 2**30,
        }
        if self._run.config.stage == 2:
            found["tokens_per_second"] = mean["tokens"] * ranks / seconds
        if self._peak is not None:
            found["mfu"] = mean["model"] / seconds / self._peak
            found["hfu"] = mean["hardware"] / seconds / self._peak
        times = {"time_data": rates["data_wait"] * seconds / steps}
        times |= {name: value for name, value in mean.items() if name.startswith("time_")}
        return found | times | {"time_rest": max(0.0, seconds / steps - sum(times.values()))}


def _peak_memory(device: str) -> int:
    """Bytes that this process had at most: of its GPU's memory in tensors, or on a CPU of the machine's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)
