"""What evaluations have found of a training, kept in its run folder, and sent to its own run in MLflow.

So that its parameters can be drawn against what it is worth. ``tested.jsonl`` has a line for each evaluation: when it
was, of which step, by which run folder, and its numbers. Of several evaluations MLflow shows the last one.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mser_dist.runs.names import Name, plain
from mser_dist.runs.record import now_ms

FILE = "tested.jsonl"


def note(training: Path, by: Path, step: int, values: Mapping[Name, float]) -> None:
    """Keep the numbers that the evaluation in the folder `by` found of a training's export of a step.

    Raises OSError where the folder cannot be written.
    """
    names = plain(values)
    numbers = {name: value for name, value in zip(names, values.values(), strict=True) if value == value}
    line = json.dumps({"time": now_ms(), "step": step, "by": str(by.resolve()), "values": numbers})
    with (training / FILE).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")  # one write, which is whole beside that of another evaluation
        file.flush()
        os.fsync(file.fileno())


def points(training: Path) -> Iterator[tuple[str, int, int, float]]:
    """Name, step, time (ms since 1970) and value of all that was kept; nothing of a damaged line.

    The step is 0, whichever the export is of: MLflow draws a metric of step 0 as a bar for each run, any other one as a
    line, of a single point.
    """
    with suppress(OSError):
        for line in (training / FILE).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                row: dict[str, Any] = json.loads(line)
                for name, value in row["values"].items():
                    yield str(name), 0, int(row["time"]), float(value)
