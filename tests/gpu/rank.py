"""One rank of one check: ``python -m tests.gpu.rank MODULE NAME DEVICE FOLDER PLACE``; its result is PLACE/RANK.json.

FOLDER is that of all checks of a run, and what one has made there the next may use.
"""

import faulthandler
import importlib
import json
import os
import sys
from pathlib import Path

from mser_dist.quiet import hush
from mser_dist.ranks import distributed
from tests.gpu.registry import Check


def main() -> None:
    faulthandler.enable()
    hush()
    module, name, device = sys.argv[1:4]
    folder, place = map(Path, sys.argv[4:])
    there: list[Check] = importlib.import_module(module).CHECKS
    [check] = [one for one in there if one.name == name]
    world = distributed.discover()
    if not check.alone:
        distributed.init(world, timeout_minutes=5, device=device)
    result = check.work(device, folder)
    (place / f"{world.rank}.json").write_text(json.dumps(result), encoding="utf-8")
    if not check.alone:
        distributed.barrier()
        distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as tests/distributed/spawn.py: DeepSpeed's group may abort in the interpreter's exit


if __name__ == "__main__":
    main()
