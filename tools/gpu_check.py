"""Check a machine's GPUs: python tools/gpu_check.py --json FILE [--only NAME …] [--list] [--minutes 10]

The checks are those of `pytest -m gpu` (tests/gpu): gradients over NCCL against gloo's, attention kernels against SDPA,
number formats, ZeRO stages, offload, a resume bit for bit, a killed rank, memory against `mser plan`, MFU, the demo. On
all GPUs of the machine, up to 8; nothing is fetched. Each runs in processes of its own and is ended when its time is
over, so that no other suffers. One line each, then rows for a table of what has run. --device cpu runs those that say
something there, on two processes over gloo.

The JSON is {"device", "versions", "rows": [{"name", "status", "value", "seconds", "line"}]}; status: ok, FAILED or
skipped. Exit code 1 if one failed, or none ran.
"""

import argparse
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # tests/ is no part of what is installed

from mser_dist.files import write_json  # noqa: E402
from tests.gpu import registry, runner  # noqa: E402


def chosen(only: list[str]) -> dict[str, registry.Check]:
    """The checks whose names hold one of these words; all without any."""
    checks = registry.checks()
    unknown = [word for word in only if not any(word in name for name in checks)]
    if unknown:
        sys.exit(f"gpu_check: there is no check {unknown[0]!r}: {', '.join(checks)}")
    return {name: check for name, check in checks.items() if not only or any(word in name for word in only)}


def shown(row: dict[str, Any]) -> str:
    said = f"({row['line']})" if row["status"] == "skipped" else row["line"]
    return f"{row['status']:7}  {row['name']:34}  {said}  [{row['seconds']:.0f} s]"


def markdown(machine: registry.Machine, rows: list[dict[str, Any]]) -> list[str]:
    """Rows for README's table: what has run on this machine, and what not."""
    count = {status: sum(row["status"] == status for row in rows) for status in ("ok", "FAILED", "skipped")}
    where = f"{max(1, machine.gpus)} × {machine.name}"
    head = f"| GPU suite | {date.today()}, {where}: {count['ok']} ok, {count['FAILED']} failed, "
    table = [head + f"{count['skipped']} skipped |"]
    return table + [f"| {row['name']} | {row['status']}: {row['line'].replace('|', '/')} |" for row in rows]


def main() -> int:
    """Run the checks and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="checks whose names hold one of these words"
    )
    parser.add_argument(
        "--list", action="store_true", help="only list the checks, and what keeps one from running here"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no check after these (default: %(default)s)")
    options = parser.parse_args()
    checks, machine = chosen(options.only), registry.Machine.of(options.device)
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="gpu_check-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if options.list:
            for check in checks.values():
                missing = check.missing(machine, folder)
                print(f"{check.name:34}  {check.what}{f' (skipped here: {missing})' if missing else ''}")
            return 0
        for check in checks.values():
            left = 60 * options.minutes - (time.monotonic() - began)
            row = runner.run(check, machine, folder, left)
            rows.append(row)
            print(shown(row), flush=True)
    report = {"device": registry.as_json(machine), "versions": registry.versions(), "rows": rows}
    if options.json:
        write_json(options.json, report)
    print("", *markdown(machine, rows), sep="\n")
    ran = [row for row in rows if row["status"] != "skipped"]
    return int(not ran or any(row["status"] == "FAILED" for row in ran))


if __name__ == "__main__":
    sys.exit(main())
