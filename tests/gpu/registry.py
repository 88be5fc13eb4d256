"""The checks of the GPU suite: what each does on its ranks, how its results are judged, what it needs of a machine."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Result = dict[str, Any]  # of a rank: plain values by name; "skipped": why it found that it cannot run here


@dataclass(frozen=True)
class Machine:
    """What checks are run on. gpus: 0 on the CPU, whose ranks are processes."""

    device: str  # cuda or cpu
    gpus: int
    name: str
    capability: tuple[int, int]
    gib: float  # memory of the smallest GPU

    @staticmethod
    def of(device: str) -> "Machine":
        """This one. On the CPU its GPUs are not asked for."""
        count = torch.cuda.device_count() if device == "cuda" and torch.cuda.is_available() else 0
        if not count:
            return Machine(device, 0, "cpu", (0, 0), 0.0)
        cards = [torch.cuda.get_device_properties(number) for number in range(count)]
        least = min(card.total_memory for card in cards)
        return Machine(device, count, cards[0].name, (cards[0].major, cards[0].minor), least / 2**30)

    @property
    def ranks(self) -> int:
        """Of a check that takes all: a GPU each; on the CPU two."""
        return min(self.gpus, 8) if self.device == "cuda" else 2


@dataclass(frozen=True)
class Outcome:
    """ok: whether it holds; value: the number that matters, if there is one; line: for a person."""

    ok: bool
    value: Any
    line: str


@dataclass(frozen=True)
class Check:
    """work: (device, folder) → what a rank found; called on each rank of a started process group, or, with `alone`,
    once and without one. judge: of all ranks' results. cpu: it says something on the CPU too. tests: the ones that do
    the same there; where there are none, its twin is in tests/gpu/test_twins.py.
    """

    name: str
    what: str  # in a few words
    work: Callable[[str, Path], Result]
    judge: Callable[[list[Result]], Outcome]
    cpu: bool
    tests: str = ""
    alone: bool = False
    single: bool = False  # one rank, however many GPUs there are
    gpus: int = 1
    module: str = ""
    capability: tuple[int, int] = (0, 0)  # at least; of a kernel built for one generation its major number alone
    only_major: bool = False
    gib: float = 0.0  # of GPU memory
    disk: float = 0.0  # GiB
    seconds: float = 120.0  # it is ended after these

    def missing(self, machine: Machine, folder: Path) -> str:
        """What keeps it from running here; empty if nothing does."""
        if machine.device == "cpu":
            return "" if self.cpu else f"of GPUs; on the CPU: {self.tests or 'nothing like it'}"
        if not machine.gpus:
            return "no GPU" if torch.version.cuda else "no GPU (this torch is built for CPUs)"
        if machine.gpus < self.gpus:
            return f"needs {self.gpus} GPUs, there {'is' if machine.gpus == 1 else 'are'} {machine.gpus}"
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        low, here = self.capability, machine.capability
        if here < low or (self.only_major and here[0] != low[0]):
            return f"needs compute capability {low[0]}.x, this GPU has {here[0]}.{here[1]}"
        if machine.gib < self.gib:
            return f"needs {self.gib:.0f} GiB of GPU memory, there are {machine.gib:.0f}"
        free = shutil.disk_usage(folder).free / 2**30
        return f"needs {self.disk:.0f} GiB of disk, {free:.0f} are free" if free < self.disk else ""

    def ranks(self, machine: Machine) -> int:
        """Processes that it starts."""
        return 1 if self.alone or self.single else machine.ranks


def checks() -> dict[str, Check]:
    """All of them by name, in the order in which they run: what others rest on comes first."""
    from tests.gpu import faults, gradients, kernels, speed, trainings

    found = [*gradients.CHECKS, *kernels.CHECKS, *trainings.CHECKS, *faults.CHECKS, *speed.CHECKS]
    return {check.name: check for check in found}


def versions() -> dict[str, str]:
    """Of what decides what a check finds."""
    packages = ("torch", "transformers", "deepspeed", "flash-attn", "flash-attn-3", "kernels")
    there = {"python": sys.version.split()[0]}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            there[package] = metadata.version(package)
    if torch.version.cuda and torch.cuda.is_available():
        there |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True) if shutil.which(asked[0]) else None
        there["driver"] = said.stdout.split("\n")[0] if said and said.returncode == 0 else "unknown"
    return there


def as_json(machine: Machine) -> Result:
    return asdict(machine)
