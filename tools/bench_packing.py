"""What the padding of batches costs: packs of tokens beside a plain shuffle and buckets, by lengths and ranks.

    python tools/bench_packing.py [--clips 200000]

`python tools/bench_stream.py` runs it too and writes its figures beside those of the loaders. A micro-batch costs its
longest clip times its clips, in tokens of 20 ms. All of a step wait for the rank whose micro-batch costs most.

- padded_over_real: cost of all micro-batches / tokens of their clips.
- largest_over_budget: cost of the dearest micro-batch / the budget of `data.tokens`. (shuffle and bucket have none:
  theirs are of as many clips as an average pack has.)
- slowest_over_mean: cost of the dearest rank / the mean of all, in the worst step; _in_all: over the steps of an epoch.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.stream.plan import Plan, Position
from mser_dist.stream.steps import TOKEN

BUDGET = 8192
RANKS = (64, 1024)
BATCHINGS = ("shuffle", "bucket", "tokens")


def _bimodal(random: np.random.Generator, count: int) -> NDArray[Any]:
    short = random.random(count) < 0.5
    return np.where(short, random.normal(3, 0.8, count), random.normal(18, 4, count))


DURATIONS: dict[str, Callable[[np.random.Generator, int], NDArray[Any]]] = {
    "lognormal": lambda random, count: random.lognormal(np.log(4.5), 0.7, count),
    "gamma": lambda random, count: random.gamma(2, 3, count),
    "bimodal": _bimodal,
}
"""Seconds a clip; those outside 0.5 to 30 s are drawn again."""


def seconds(kind: str, count: int) -> NDArray[np.float32]:
    """(count,) lengths of clips."""
    drawn = DURATIONS[kind](np.random.default_rng(0), 2 * count)
    return drawn[(drawn >= 0.5) & (drawn <= 30)][:count].astype(np.float32)


def measured(duration: NDArray[Any], batching: str, ranks: int) -> dict[str, float]:
    """The figures of an epoch with a micro-batch a rank and step."""
    tokens = np.ceil(duration / TOKEN).astype(np.int64)
    micro = round(BUDGET / tokens.mean())
    batch = ranks if batching == "tokens" else ranks * micro
    options: dict[str, Any] = {"tokens": tokens, "budget": BUDGET} if batching == "tokens" else {"duration": duration}
    plan = Plan(len(tokens), batch, 0, batching=batching, **options)
    real, cost = 0, []
    for position in plan.walk(Position(), plan.steps()):
        shares = plan.share(position, 0, 1, micro)  # all ranks', in their order
        real += sum(int(tokens[share].sum()) for share in shares)
        cost.append([int(tokens[share].max()) * len(share) for share in shares])
    costs = np.array(cost)  # (steps, ranks)
    return {
        "padded_over_real": float(costs.sum() / real),
        "largest_over_budget": float(costs.max() / BUDGET),
        "slowest_over_mean": float((costs.max(1) / costs.mean(1)).max()),
        "slowest_over_mean_in_all": float(costs.max(1).sum() / costs.mean(1).sum()),
    }


def rows(clips: int = 200_000) -> list[dict[str, Any]]:
    return [
        {"durations": kind, "batching": batching, "ranks": ranks, **measured(seconds(kind, clips), batching, ranks)}
        for kind in DURATIONS
        for batching in BATCHINGS
        for ranks in RANKS
    ]


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        f"{'durations':<11}{'batching':<9}{'ranks':>6}{'padded/real':>13}{'largest/budget':>16}{'slowest/mean':>14}"
    ]
    for row in found:
        start = f"{row['durations']:<11}{row['batching']:<9}{row['ranks']:>6}{row['padded_over_real']:>13.3f}"
        lines.append(f"{start}{row['largest_over_budget']:>16.3f}{row['slowest_over_mean']:>14.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200_000, help="(default: %(default)s)")
    print(table(rows(parser.parse_args().clips)))


if __name__ == "__main__":
    main()
