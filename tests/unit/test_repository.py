"""The repository itself: its layout, its job scripts, and what the installed package carries."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"mser_dist", "ds_configs", "slurm", "tests", "tools"}
PYTHON_FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SHELL_FILES = [*sorted((ROOT / "slurm").rglob("*.sh")), *sorted((ROOT / "tools").glob("*.sh")), ROOT / ".ci" / "run"]
SOURCED = [ROOT / "slurm/common.sh", ROOT / "slurm/site.sh", *(ROOT / "slurm/sites").glob("*.sh")]
VERBS = {"features": "features", "stage1": "train", "stage2": "train", "eval": "eval"}
PRESETS = {"features": "stage1"}  # of job scripts that have none of their own
STAGES = tuple(VERBS)


def tracked_files() -> list[str]:
    """What git tracks, or would track, as paths relative to the root."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def test_top_level_folders_are_those_of_the_design() -> None:
    tracked = {Path(path).parts[0] for path in tracked_files() if "/" in path}
    assert {folder for folder in tracked if not folder.startswith(".")} == FOLDERS


def test_tracked_files_are_small() -> None:
    large = [path for path in tracked_files() if (ROOT / path).stat().st_size > 1 << 20]
    assert not large, "weights, audio and runs do not belong in git"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_scripts_parse(path: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "set -euo pipefail" in path.read_text() or path in SOURCED


def run_job_script(
    stage: str, spool: Path, arguments: list[str], home: Path | None = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a job script as SLURM does, from a copy; the `srun` it finds prints its arguments and some variables."""
    script = spool / "slurm_script"
    script.write_bytes((ROOT / "slurm" / f"{stage}.sh").read_bytes())
    srun = spool / "srun"
    srun.write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@"\nprintf "OMP=%s RANK=%s\\n" "$OMP_NUM_THREADS" "${RANK-unset}"\n'
        "exit ${MSER_SRUN_CODE:-0}\n"
    )
    srun.chmod(0o755)
    environment = {
        "PATH": f"{spool}:{os.environ['PATH']}",
        "MSER": "/bin/true",
        "SLURM_JOB_ID": "1",
        "SLURM_CPUS_PER_TASK": "3",
        "RANK": "5",
        "SLURM_SUBMIT_DIR": str(home or spool),
        **env,
    }
    return subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True, env=environment, cwd=spool)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("arguments", "train"),
    [
        ([], ["whisper-large-v3_llama3-8b_{stage}"]),
        (["steps=3"], ["whisper-large-v3_llama3-8b_{stage}", "steps=3"]),
        (["my config.yaml", "a=b c"], ["my config.yaml", "a=b c"]),
    ],
)
def test_job_scripts_hand_config_and_overrides_to_train(
    stage: str, arguments: list[str], train: list[str], tmp_path: Path
) -> None:
    done = run_job_script(stage, tmp_path, arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    task = ["bash", str(ROOT / "slurm" / "task.sh")]
    words = [word.format(stage=PRESETS.get(stage, stage)) for word in train]
    expected = [*task, "/bin/true", VERBS[stage], *words, *(["--part", "0/1"] if stage == "features" else [])]
    assert lines == ["--kill-on-bad-exit=1", "--cpus-per-task=3", *expected, "OMP=3 RANK=unset"]


@pytest.mark.parametrize(("more", "part"), [({}, "3/8"), ({"SLURM_ARRAY_TASK_COUNT": "1", "MSER_PARTS": "8"}, "3/8")])
def test_each_job_of_an_array_encodes_its_part(more: dict[str, str], part: str, tmp_path: Path) -> None:
    """The second is one job of an array that is run again alone."""
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    done = run_job_script("features", tmp_path, ["my.yaml", "seed=1"], ROOT, **array | more)
    assert done.stdout.splitlines()[-6:-1] == ["features", "my.yaml", "seed=1", "--part", part], done.stderr


def test_each_job_of_an_array_translates_its_part(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "MSER": "/bin/echo"}
    done = run_job_script("translate", tmp_path, ["a set", "out", "--to", "fr"], ROOT, **array)
    assert done.stdout == "translate a set out --to fr --part 3/8 --workers 3\n", done.stderr
    done = run_job_script("translate", tmp_path, [], ROOT, MSER="/bin/echo", MSER_WORKERS="1", MSER_PARTS="2")
    assert done.stdout == "translate --part 0/2 --workers 1\n"


@pytest.mark.parametrize("stage", [*STAGES, "translate"])
def test_job_scripts_say_where_the_repository_is_looked_for(stage: str, tmp_path: Path) -> None:
    done = run_job_script(stage, tmp_path, [], home=None)
    assert done.returncode == 2
    assert "export MSER_HOME" in done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_job_scripts_default_to_a_preset_that_exists(stage: str) -> None:
    found = re.search(rf"^run_on_all {VERBS[stage]} (\S+)", (ROOT / "slurm" / f"{stage}.sh").read_text(), re.MULTILINE)
    assert found and (ROOT / "mser_dist" / "config" / "presets" / f"{found[1]}.yaml").is_file()


def test_every_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tested = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            tested[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    for text in [*project["dependencies"], *extras["dev"], *extras["demo"], *extras["smollm2"]]:
        requirement = Requirement(text)
        version = tested.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt lacks {requirement.name}"
        assert requirement.specifier.contains(version), f"constraints.txt pins {requirement.name} outside {text}"


def test_the_wheel_and_the_sdist_carry_the_data_files(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the dev extra brings hatchling")
    # hatchling itself, in this environment: pip would make a build environment, for which it needs the network.
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"mser_dist/ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")}
    expected |= {
        f"mser_dist/config/presets/{path.name}" for path in (ROOT / "mser_dist" / "config" / "presets").glob("*.yaml")
    }
    assert len(expected) >= 2, "no configs in the checkout"
    assert expected | {"mser_dist/synth/sentences.json", "mser_dist/cli/main.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "slurm/"))]
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "Makefile", "constraints.txt", "slurm/stage1.sh", "slurm/common.sh"} <= inside
    assert {"slurm/sites/bare.sh", "slurm/containers/Dockerfile", "slurm/containers/apptainer.def"} <= inside
