"""What a plan says of a job before it runs: the one place where its figures come into a check."""

from dataclasses import dataclass

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.planning.cluster import Cluster


@dataclass(frozen=True)
class Figures:
    """memory: bytes of the fullest rank, on its GPU. room: bytes that such a GPU has for them. seconds: of the whole
    training. checkpoint: bytes of one, over all ranks. None: not known. why: it is not planned.
    """

    memory: float | None = None
    room: float | None = None
    seconds: float | None = None
    checkpoint: float | None = None
    why: str = ""


def figures(config: cfg.Stage1 | cfg.Stage2 | cfg.Evaluation, cluster: Cluster | None) -> Figures:
    """The figures of a training on a cluster; none of an evaluation, or where no GPU is named."""
    if cluster is None:
        return Figures(why="--gpu h100 plans it")
    if isinstance(config, cfg.Evaluation):
        return Figures(why="an evaluation is not planned")
    from mser_dist.planning.memory import USABLE
    from mser_dist.planning.plan import plan

    try:
        found = plan(config, cluster)
    except Exception as error:  # of a shape that nobody thought of: the other checks are told all the same
        return Figures(why=str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
    return Figures(found.memory_sum, USABLE * cluster.gpu.memory, found.duration, found.checkpoint)
