"""What a loss will take, before it is run. See README.md for where the terms come from."""

from mser_dist.contrastive.exchange import Gather


def peak_bytes(
    rows: int,
    width: int,
    *,
    ranks: int = 1,
    gather: Gather = "all_gather",
    tile: int = 1024,
    classes: int | None = None,
) -> int:
    """Most bytes that a "mean" loss (fp32) holds at once besides its inputs, forward and backward, on one rank.

    Args:
        rows: of this rank, all ranks being alike.
        width: of an embedding.
        classes: of its rows; None: each row is one (infonce).
    """
    columns = rows * ranks
    held = columns if gather == "all_gather" else rows
    classes = rows if classes is None else classes
    across = min(tile or columns, columns)
    down = min(tile or rows, rows)
    embeddings = 2 * rows  # the scaled rows and the rows' gradient
    embeddings += 2 * (classes + 1)  # the sums of a class's columns, and what these get of its rows
    embeddings += held  # the columns' gradient
    if ranks > 1 and gather == "all_gather":
        embeddings += held  # the columns of all ranks
    if ranks > 1 and gather == "ring":
        embeddings += held * min(ranks - 1, 2)  # columns at work (but for a rank's own) and on their way
        embeddings += held  # the gradient that is on its way
    ids = 8 * columns * 20  # int64 ids, counts and weights
    return 4 * (width * embeddings + 3 * across * down) + ids
