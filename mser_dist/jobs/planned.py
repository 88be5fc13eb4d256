"""What a plan says of a job before it runs: the one place where its figures come into a check."""

from dataclasses import dataclass

from mser_dist import config as cfg


@dataclass(frozen=True)
class Figures:
    """memory: bytes of the fullest rank, on its GPU. room: bytes that such a GPU has. seconds: of the whole training.

    checkpoint: bytes of one, over all ranks. None: not known.
    """

    memory: int | None = None
    room: int | None = None
    seconds: float | None = None
    checkpoint: int | None = None


def figures(config: cfg.Stage1 | cfg.Stage2 | cfg.Evaluation, ranks: int) -> Figures:
    """The figures of a job of so many ranks. Nothing plans yet: all of them are unknown."""
    return Figures()
