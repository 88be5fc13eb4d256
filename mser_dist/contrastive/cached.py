"""Gradient caching (GradCache, arXiv 2101.06983): a contrastive batch of any size in the memory of one chunk.

    1. Every chunk goes through the towers without a graph; only its embeddings stay.
    2. The loss of all embeddings, over all ranks, gives the gradient of each embedding.
    3. Every chunk goes through the towers again, with a graph, and is told its embeddings' gradients.

The random state of torch is replayed, so dropout gives the same embeddings both times; randomness of another library is
not. The last chunk keeps its graph from the first pass and is not computed twice. What a forward pass changes, such as
the running mean of a BatchNorm, is changed twice by all other chunks.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Embedded(NamedTuple):
    """What towers make of a chunk: (n, …) tensors with a row for each sample, and tensors that every chunk shares."""

    rows: tuple[Tensor, ...]
    shared: tuple[Tensor, ...] = ()  # functions of parameters alone, such as a scale


def cached_backward(
    chunks: Sequence[T],
    embed: Callable[[T], Embedded],
    loss: Callable[[Embedded], tuple[Tensor, Any]],
    *,
    backward: Callable[[Tensor], None] = lambda loss: loss.backward(),
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, Any]:
    """Accumulate in the towers' parameters the gradient of a loss over all chunks; returns the loss and its extras.

    Args:
        chunks: parts of this rank's batch. Under ZeRO-3, where a forward pass is collective, equally many on all ranks.
        embed: a chunk through the towers (call the DDP or DeepSpeed wrapper, not its module).
        loss: (loss, extras) of the embeddings of all chunks, rows in the order of the chunks. Called once; collective
            where the loss is. Everything that it differentiates comes in through `Embedded`.
        backward: how to run backward, e.g. a DeepSpeed engine's.
        no_sync: a context for all chunks but the one that comes last, e.g. DDP's `no_sync`.

    With one DDP model:

        loss, _ = cached_backward(chunks, model, contrast, no_sync=model.no_sync)
        optimizer.step()
    """
    if not chunks:
        raise ValueError("no chunks: a rank without samples gives one empty chunk")
    alone = len(chunks) == 1
    states = []
    passed = []
    for number, chunk in enumerate(chunks):
        states.append(_RandomState())
        last = number == len(chunks) - 1
        with torch.set_grad_enabled(last), nullcontext() if alone or not last else no_sync():
            passed.append(embed(chunk))
    leaves = Embedded(
        tuple(_leaf(torch.cat(parts)) for parts in zip(*(e.rows for e in passed), strict=True)),
        tuple(_leaf(each) for each in passed[-1].shared),
    )
    value, extras = loss(leaves)
    value.backward()
    after = _RandomState()
    sizes = [len(e.rows[0]) for e in passed]
    row_grads = [_grad(leaf).split(sizes) for leaf in leaves.rows]
    shared_grads = [_grad(leaf) for leaf in leaves.shared]

    # The last chunk first: its graph is there, and must not stay while the others need the memory.
    kept = passed.pop()
    del passed, leaves
    for turn, number in enumerate([len(chunks) - 1, *range(len(chunks) - 1)]):
        with nullcontext() if turn == len(chunks) - 1 else no_sync():
            if turn:
                states[number].restore()
                kept = embed(chunks[number])
            # Its gradient is the cached one. What is shared comes in equal parts from all chunks, so that each chunk's
            # backward pass reaches every parameter.
            surrogate = torch.zeros((), device=value.device)
            for row, grads in zip(kept.rows, row_grads, strict=True):
                surrogate = surrogate + (row.to(grads[number].dtype) * grads[number]).sum()
            for each, grad in zip(kept.shared, shared_grads, strict=True):
                surrogate = surrogate + (each.to(grad.dtype) * grad).sum() / len(chunks)
            backward(surrogate)
            del kept, surrogate
    after.restore()
    return value.detach(), extras


def _leaf(embedding: Tensor) -> Tensor:
    """In fp32 at least: the gradients of a large batch's mean are too small for float16, before any loss scaling."""
    wide = embedding.dtype if embedding.dtype == torch.float64 else torch.float32
    return embedding.detach().to(wide).requires_grad_()


def _grad(leaf: Tensor) -> Tensor:
    """What the loss asks of an embedding; zeros where it does not use it: every parameter gets a gradient."""
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)


class _RandomState:
    """The state of torch's generators: the CPU's, and the current GPU's."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu)
