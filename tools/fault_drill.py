"""Run the fault drills and write what they found: python tools/fault_drill.py --json FILE [--only NAME …] [--list]

A drill is one test, or several, marked ``drill("NAME")`` under ``tests/``: real jobs of two processes under ZeRO-3, or
real SLURM jobs, that are killed, stopped, signalled, corrupted or starved while they run. The JSON is
{"drills": [{"name", "passed", "seconds", "detail"}]}; exit code 1 if a drill failed or could not run.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


class Drills:
    """A pytest plugin that keeps the marked tests and their outcomes."""

    def __init__(self, only: list[str]) -> None:
        self.only = only
        self.names: dict[str, str] = {}  # test → drill
        self.found: dict[str, dict[str, Any]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = []
        for item in items:
            marker = item.get_closest_marker("drill")
            if marker and (not self.only or marker.args[0] in self.only):
                self.names[item.nodeid] = marker.args[0]
                kept.append(item)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = self.names[report.nodeid]
        drill = self.found.setdefault(name, {"name": name, "passed": True, "seconds": 0.0, "detail": []})
        drill["seconds"] += report.duration
        drill["detail"] += [f"{key}: {value}" for key, value in report.user_properties if report.when == "call"]
        if report.skipped:  # not run is not passed
            drill["passed"] = False
            drill["detail"].append(f"skipped: {report.longrepr[2] if isinstance(report.longrepr, tuple) else ''}")
        elif report.failed:
            drill["passed"] = False
            drill["detail"].append(f"{report.nodeid}: {str(report.longrepr).strip().splitlines()[-1]}")

    def results(self) -> Iterator[dict[str, Any]]:
        for drill in self.found.values():
            yield {**drill, "seconds": round(drill["seconds"], 1), "detail": "; ".join(drill["detail"])}


def main() -> int:
    """Run the drills and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these drills (default: all)")
    parser.add_argument("--list", action="store_true", help="print the drills' tests and run none")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    drills = Drills(options.only)
    arguments = ["-q", "--no-header", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    # Only the files that have drills: the others need not be imported.
    marked = re.compile(r"^@pytest\.mark\.drill\(", re.MULTILINE)
    files = [
        file for file in sorted(options.tests.rglob("test_*.py")) if marked.search(file.read_text(encoding="utf-8"))
    ]
    arguments += map(str, files or [options.tests])
    code = pytest.main([*arguments, *(["--collect-only", "-qq"] if options.list else [])], plugins=[drills])
    unknown = set(options.only) - set(drills.names.values())
    if unknown:
        print(f"no such drill: {', '.join(sorted(unknown))}; --list shows them", file=sys.stderr)
        return 2
    if options.list:
        for test, name in sorted(drills.names.items(), key=lambda pair: pair[1]):
            print(f"{name}\t{test}")
        return 0
    results = list(drills.results())
    if options.json:
        text = json.dumps({"drills": results}, indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    for drill in results:
        outcome = "passed" if drill["passed"] else "FAILED"
        print(f"{outcome}  {drill['seconds']:7.1f} s  {drill['name']}  {drill['detail']}")
    return 0 if code == 0 and all(drill["passed"] for drill in results) else 1


if __name__ == "__main__":
    sys.exit(main())
