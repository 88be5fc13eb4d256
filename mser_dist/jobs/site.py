"""A site file, as a submission from Python reads it: what sbatch and srun are told, and the container of the tasks.

The job scripts read the same files by themselves (slurm/site.sh), whose README says what they may set.
"""

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mser_dist.errors import UserError

_LISTS = ("SITE_SBATCH", "SITE_SRUN", "SITE_RUN")
_WORDS = ("SITE_GPUS", "SITE_NODE_GPUS", "SITE_MSER")
# Source the file as a job would, and print each list's and word's values, ended by a zero byte; `x` ends a list.
_READ = """\
set -euo pipefail
SITE_SBATCH=() SITE_SRUN=() SITE_RUN=() SITE_GPUS='--gpus-per-node=%n' SITE_NODE_GPUS='' SITE_MSER=''
source "$1" >&2
set +u # an empty list counts as unset where it is read by another name
printf '%s\\0' "${!SITE_@}"
for name in SITE_SBATCH SITE_SRUN SITE_RUN SITE_GPUS SITE_NODE_GPUS SITE_MSER; do
  declare -n values=$name
  printf '%s\\0' "${#values[@]}" "${values[@]}"
done
"""


@dataclass(frozen=True)
class Site:
    """What a site file says. The default is a site that needs none."""

    path: Path | None = None
    sbatch: tuple[str, ...] = ()
    """Options of sbatch, each in one word: ``--key=value``, or ``--flag``."""
    srun: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    """In front of the command of each task: a container's runner."""
    gpus: str = "--gpus-per-node=%n"
    """How GPUs are asked for; ``%n`` is their number on a node."""
    mser: str = ""
    """The command inside the container; empty: none."""

    def options(self, gpus_per_node: int) -> dict[str, str | bool]:
        """Options of sbatch by their names, those for the GPUs among them."""
        words = [*self.sbatch, *([self.gpus.replace("%n", str(gpus_per_node))] if gpus_per_node else [])]
        found: dict[str, str | bool] = {}
        for word in words:
            key, equals, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or not re.fullmatch(r"[a-z][a-z-]*", key):
                raise UserError(
                    f"{self.path}: {word!r} is no option of sbatch in one word: write --key=value, or --flag"
                )
            found[key.replace("-", "_")] = value if equals else True
        return found

    @property
    def setup(self) -> list[str]:
        """Shell lines of the job, before srun: the site's own, and no binding of a GPU to a task (slurm/site.sh)."""
        unbind = "unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_TRES_BIND SLURM_GPU_BIND"
        if self.path is None:
            return [unbind]
        home = f"export MSER_HOME=${{MSER_HOME:-{shlex.quote(str(_home(self.path)))}}}"
        begin = "if declare -F site_begin >/dev/null; then site_begin; fi"
        return [home, f"source {shlex.quote(str(self.path))}", begin, unbind]

    @property
    def python(self) -> str | None:
        """The command of Python in a task, or None for that of the submission: beside `mser` in the container."""
        if not self.mser:
            return None
        return shlex.join([*self.run, str(Path(self.mser).with_name("python"))])


def read(path: str | Path | None) -> Site:
    """The site file at `path`, or that of ``MSER_SITE``, or none. `UserError` where it cannot be read or used."""
    path = path or os.environ.get("MSER_SITE")
    if not path:
        return Site()
    file = Path(path).absolute()
    if not file.is_file():
        raise UserError(
            f"there is no site file {path}: give the path of one (--site, MSER_SITE), e.g. slurm/sites/bare.sh"
        )
    home = {"MSER_HOME": os.environ.get("MSER_HOME", str(_home(file)))}
    try:
        done = subprocess.run(
            ["bash", "-c", _READ, "bash", str(file)],
            capture_output=True, encoding="utf-8", errors="replace", timeout=60, env=os.environ | home,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"the site file {path} could not be read by bash: {error}") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"the site file {path} ends with an error: {said}")
    names, values = _parse(done.stdout)
    if unknown := [name for name in names if name not in (*_LISTS, *_WORDS)]:
        known = ", ".join((*_LISTS, *_WORDS))
        raise UserError(f"{path} sets {', '.join(unknown)}, which nothing reads: the names are {known}")
    one = {name: (values[name] or ("",))[0] for name in _WORDS}
    return Site(
        path=file,
        sbatch=values["SITE_SBATCH"], srun=values["SITE_SRUN"], run=values["SITE_RUN"],
        gpus=one["SITE_GPUS"], mser=one["SITE_MSER"],
    )  # fmt: skip


def _parse(text: str) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The names that are set, and each setting's words, from what `_READ` prints."""
    parts = text.split("\0")
    names = []
    while parts and parts[0].startswith("SITE_"):
        names.append(parts.pop(0))
    values: dict[str, tuple[str, ...]] = {}
    for name in (*_LISTS, *_WORDS):
        count = int(parts.pop(0))
        values[name], parts = tuple(parts[:count]), parts[count:]
    return names, values


def _home(file: Path) -> Path:
    """The repository that a site file lies in, or else the working folder."""
    return next((folder for folder in file.parents if (folder / "slurm/common.sh").is_file()), Path.cwd())
