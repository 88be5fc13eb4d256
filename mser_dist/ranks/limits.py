"""The limit on a process' open files: raised as far as it goes, and held against what so many ranks need."""

import resource

from mser_dist.errors import UserError

OWN = 192  # files and sockets of a rank that do not grow with the ranks: shards, workers, NCCL, the log
PER_RANK = 2  # of the store's server: each rank's connection, and its watchdog's


def raise_limit() -> int:
    """Raise the limit on open files to the hard one, for this process and those that it starts; what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # a sandbox that forbids it
            return soft
    return hard


def check_files(ranks: int, serves: bool, mesh: bool, limit: int | None = None) -> None:
    """Raise `UserError` where this process may open too few files for a job of so many ranks.

    serves: the store's server is started from here. mesh: the process group is gloo's, which connects every two ranks,
    and DeepSpeed makes a second group like it. limit: what `raise_limit` came to.
    """
    limit = raise_limit() if limit is None else limit
    if limit == resource.RLIM_INFINITY:
        return
    needs = OWN + max(PER_RANK * ranks if serves else 0, 2 * ranks if mesh else 0)
    if ranks > 1 and needs > limit:
        most = max(1, (limit - OWN) // 2)
        raise UserError(
            f"{ranks} ranks need up to {needs} open files in one process, and {limit} are allowed (ulimit -Hn): raise "
            "the hard limit (LimitNOFILE of slurmd's unit, limits.conf; sbatch --propagate=NOFILE hands the submitting "
            f"shell's on), or start {most} rank{'s' * (most > 1)} at most"
        )
