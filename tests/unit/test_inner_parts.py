"""What other libraries do not promise to keep is used in known places only."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mser_dist.deepspeed_parts import INNER

PACKAGE = Path(__file__).parents[2] / "mser_dist"
HOME = PACKAGE / "deepspeed_parts.py"
DOOR = PACKAGE / "deepspeed_module.py"
# Names of DeepSpeed's that this package also uses for things of its own.
OWN = {"skipped_steps", "ds_json"}  # training.engine.Engine's; the JSON of a run
# Private names of others for which there is no public one: file → names.
NO_OTHER_WAY = {
    "jobs/launch.py": {"_make_sbatch_string"},  # submitit: what it would send to sbatch, for a dry run
    "jobs/job.py": {"_process"},  # submitit: a local job's process, whose end says more than its state
    "models/attention.py": {"_supports_sdpa", "_supports_flash_attn"},  # transformers: else by building the model
    # transformers: the kernel that a config ended with, which its public name does not tell
    "models/packed.py": {"_attn_implementation"},
    "models/flops.py": {"_attn_implementation"},
    "models/self_check.py": {"_attn_implementation"},
    "synth/espeak.py": {"_handle"},  # ctypes documents it: the handle for dlclose
}


def named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of all that a file reads or sets of objects: attributes, getattr and the like, imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[1:2] if isinstance(arg, ast.Constant))
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)


def files() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_inner_names_of_deepspeed_are_used_in_one_file() -> None:
    inner = {name for names in INNER.values() for name in names} - OWN
    for path, tree in files():
        if path != HOME:
            mine = ((line, name) for line, name in named(tree) if name not in OWN)
            found = [f"{path}:{line}: {name}" for line, name in mine if name in inner or name.startswith("ds_")]
            assert found == [], "DeepSpeed's inner names belong into deepspeed_parts.py"


def test_deepspeed_comes_through_one_door_and_without_mlflow() -> None:
    for path, tree in files():
        if path != DOOR:
            imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
            assert "deepspeed" not in imported, f"{path}: take deepspeed_module.module()"
    code = (
        "import sys; from mser_dist import deepspeed_module; deepspeed_module.module()\n"
        "assert 'mlflow' not in sys.modules\n"
        "import mlflow; mlflow.MlflowClient"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})


def test_every_listed_name_is_used() -> None:
    used = {name for _, name in named(ast.parse(HOME.read_text(encoding="utf-8")))}
    constants = {n.value for n in ast.walk(ast.parse(HOME.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant)}
    lists = {"global_steps", "global_samples", "cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"}
    assert lists <= constants  # `counters` and `scale` go through a tuple of them
    for holder, names in INNER.items():
        assert (unused := names.keys() - used - lists - OWN) == set(), f"{holder}: nothing needs {unused} any more"


def test_no_private_part_of_another_library_is_used_elsewhere() -> None:
    for path, tree in files():
        nodes = list(ast.walk(tree))
        own = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        listed = NO_OTHER_WAY.get(str(path.relative_to(PACKAGE)), set())
        assert (gone := listed - {name for _, name in named(tree)}) == set(), f"{path} uses {gone} no more: unlist it"
        allowed = own | {"_exit", "_replace"} | listed  # os', and named tuples'; both are documented
        private = ((line, name) for line, name in named(tree) if name.startswith("_") and not name.endswith("__"))
        found = [f"{path}:{line}: {name}" for line, name in private if name not in allowed]
        assert path == HOME or found == [], "a private part of another library: is there no public way?"
