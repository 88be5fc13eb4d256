"""A log of what the ranks of a job say to each other: every collective that goes through torch, by kind and group."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_KINDS = {
    "allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "broadcast": "broadcast",
}
_KINDS |= {"alltoall": "all-to-all", "reduce_": "reduce", "send": "send", "recv": "receive", "scatter": "scatter"}


@dataclass(frozen=True)
class Traffic:
    """Of one kind in groups of so many ranks: messages, and the bytes of their whole tensors (of all ranks' parts)."""

    kind: str
    ranks: int
    calls: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends by rings (NCCL's): each part goes around, an all-reduce twice."""
        return self.bytes * (1 - 1 / self.ranks) * (2 if self.kind == "all-reduce" else 1)


class Log(TorchDispatchMode):
    """Counts the collectives within; pretending: tensors have no storage (FakeTensorMode), nobody else is there.

    A number that is read of a tensor without storage is 1, or False: it decides nothing that is counted.
    """

    def __init__(self, pretending: bool = False) -> None:
        super().__init__()
        self.pretending = pretending
        self.clear()

    def clear(self) -> None:
        """Forget what was said."""
        self._calls: dict[tuple[str, int], int] = defaultdict(int)
        self._bytes: dict[tuple[str, int], int] = defaultdict(int)

    def said(self) -> list[Traffic]:
        """All of it, in order of its bytes."""
        found = [Traffic(*key, self._calls[key], self._bytes[key]) for key in self._calls]
        return sorted(found, key=lambda one: -one.bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            name = func.__name__.lstrip("_")
            kind = next((kind for start, kind in _KINDS.items() if name.startswith(start)), None)
            if kind is not None:
                key = kind, _ranks(args)
                self._calls[key] += 1
                self._bytes[key] += max(map(_bytes, args))
        if not self.pretending:
            return func(*args, **kwargs)
        # Whole numbers that do not come of tensors without storage stay as they are: DeepSpeed compares some of its own
        # between ranks.
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if given and not any(isinstance(one, FakeTensor) or one.is_floating_point() for one in given):
            if func is torch.ops.aten.lift_fresh.default:
                return args[0]
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _bytes(given: Any) -> int:
    """Of a tensor, or of a list of them."""
    if isinstance(given, Tensor):
        return given.numel() * given.element_size()
    return sum(map(_bytes, given)) if isinstance(given, (list, tuple)) else 0


def _ranks(args: Any) -> int:
    for one in args:
        if isinstance(one, torch.ScriptObject):
            try:
                return int(torch.distributed.ProcessGroup.unbox(one).size())
            except Exception:  # a reduce operation is such an object too
                continue
    return torch.distributed.get_world_size()
