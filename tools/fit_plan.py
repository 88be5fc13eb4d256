"""Fits the step-time model of `mser plan` on published figures, and says how far it is off on sources held out.

    python tools/fit_plan.py            # fit, write mser_dist/planning/constants.json, report
    python tools/fit_plan.py --check    # report of the constants that are shipped

Half a minute on one core.
"""

import argparse
from collections import Counter

import numpy as np

from mser_dist import tables
from mser_dist.files import write_json
from mser_dist.planning import fit, published, step_time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    seen, unseen = published.split(published.figures())
    if options.check:
        constants = step_time.shipped()[0]
    else:
        constants = fit.fit(seen)
        held = fit.held_out(constants)
        factors = 1 / (1 + held.errors)  # published seconds over planned ones
        content = {
            "fitted_on": dict(sorted(Counter(figure.source for figure in seen).items())),
            "held_out": dict(sorted(Counter(figure.source for figure in unseen).items())),
            "constants": step_time.as_json(constants),
            "interval": [float(np.quantile(factors, 0.1)), float(np.quantile(factors, 0.9))],
        }
        write_json(step_time.FILE, content)
        print(f"constants: {step_time.FILE}")
    report(constants, seen, unseen)


def report(constants: step_time.Constants, seen: list[published.Figure], unseen: list[published.Figure]) -> None:
    held, others = fit.held_out(constants), fit.one_source_out()
    many = published.MANY
    rows = [
        [title, *_numbers(part, constants)]
        for title, part in (
            *((f"fitted on: {name}", [f for f in seen if f.source == name]) for name in _names(seen)),
            *((f"held out: {name}", [f for f in unseen if f.source == name]) for name in _names(unseen)),
        )
    ]
    missed = [
        [
            f.number,
            f.source,
            f.model,
            f.strategy,
            str(f.ranks),
            f"{f.seconds:.2f}",
            f"{f.seconds * (1 + e):.2f}",
            f"{e:+.0%}",
        ]
        for f, e in zip(held.figures, held.errors, strict=True)
        if abs(e) > 0.15
    ]
    tables.show(
        tables.Table(["constant", "value"], [[[k, f"{v:.4g}"] for k, v in step_time.as_json(constants).items()]]),
        tables.Table(["source", "figures", "median error", "90th percentile", "bias"], [rows], "lrrrr"),
        f"held out, {many} GPUs and more: {len(held.figures)} figures, median error {held.median:.1%}, 90th percentile "
        f"{held.p90:.1%}",
        f"each source by constants fitted on all others, {many} GPUs and more: {len(others.figures)} figures, median "
        f"{others.median:.1%}, 90th percentile {others.p90:.1%}",
        f"held out, {many} GPUs and more, off by over 15 %:",
        tables.Table(["row", "source", "model", "how", "GPUs", "s", "planned", "off"], [missed], "llllrrrr"),
    )


def _names(found: list[published.Figure]) -> list[str]:
    return sorted({figure.source for figure in found})


def _numbers(found: list[published.Figure], constants: step_time.Constants) -> list[str]:
    signed = fit.errors(found, constants)
    size = np.abs(signed)
    return [str(len(found)), f"{np.median(size):.1%}", f"{np.quantile(size, 0.9):.1%}", f"{np.median(signed):+.1%}"]


if __name__ == "__main__":
    main()
