"""Site files and containers: job scripts and Python read the same from a file, and what is pinned is pinned once."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from mser_dist.errors import UserError
from mser_dist.jobs import launch, site
from mser_dist.jobs.requeue import requeue
from tests.unit.test_repository import SHELL_FILES, run_job_script

ROOT = Path(__file__).resolve().parents[2]
SITES = sorted((ROOT / "slurm/sites").glob("*.sh"))
CONTAINERS = ROOT / "slurm/containers"


def submit(*words: str | Path, code: int = 0, **env: str) -> list[str]:
    """The words of the sbatch command that `submit.sh --show` prints; with another `code`, the lines of its error."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MSER", "SLURM"))}
    done = subprocess.run(
        [ROOT / "slurm/submit.sh", *map(str, words)], capture_output=True, text=True, env=clean | env, cwd=ROOT
    )
    assert done.returncode == code, done.stderr
    return shlex.split(done.stdout) if code == 0 else done.stderr.splitlines()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install shellcheck")
def test_shellcheck_finds_nothing() -> None:
    found = subprocess.run(["shellcheck", "-x", *map(str, SHELL_FILES)], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout


def test_the_three_shapes_ask_for_gpus_in_three_ways() -> None:
    sites = {path.stem: site.read(path) for path in SITES}
    assert set(sites) == {"bare", "pyxis", "apptainer"}
    assert [sites[name].gpus for name in sorted(sites)] == ["--gpus-per-task=1", "--gpus-per-node=%n", "--gres=gpu:%n"]
    assert not sites["bare"].mser and sites["bare"].python is None
    assert any(word.startswith("--container-image=") for word in sites["pyxis"].srun) and not sites["pyxis"].run
    assert str(sites["apptainer"].python).startswith("apptainer exec --nv")
    assert str(sites["apptainer"].python).endswith("/images/mser.sif /opt/mser/bin/python")


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.stem)
def test_the_job_scripts_and_python_ask_for_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSER_SITE", str(path))
    words = submit("--show", "--gpus-per-node=4", "--ntasks-per-node=4", "slurm/stage1.sh", "demo_stage1")
    config = launch.resolve("demo_stage1", [])
    text = launch.script([config], launch.Resources(nodes=2, gpus_per_node=4), name="x")
    lines = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    site_words = set(submit("--show", f"--site={path}", "--gpus-per-node=4", "slurm/stage1.sh")[1:-1])
    assert words[-2:] == ["slurm/stage1.sh", "demo_stage1"] and words[0] == "sbatch"
    assert len(site_words) >= 3 and site_words <= lines
    assert f"source {path}" in text and "--kill-on-bad-exit=1" in text
    assert [line for line in lines if "gpu" in line and "partition" not in line] == [
        word for word in site_words if "gpu" in word and "partition" not in word
    ]


def test_a_node_of_fewer_gpus_gets_fewer_tasks_and_the_command_line_wins() -> None:
    small = "slurm/sites/apptainer.sh"
    words = submit("--show", "slurm/stage1.sh", MSER_SITE=small)
    assert {"--ntasks-per-node=4", "--gpus-per-task=1", "--constraint=a100"} <= set(words)
    words = submit("--show", "--partition=other", "--nodes=1", "slurm/features.sh", MSER_SITE=small)
    assert "--gpus-per-task=1" in words and not [word for word in words if word.startswith("--ntasks")]
    assert words.index("--partition=other") > words.index("--partition=gpu"), "sbatch takes the last"
    without = submit("--show", "--gpus-per-node=0", "--ntasks-per-node=1", "slurm/stage1.sh", MSER_SITE=small)
    assert not [word for word in without if "gpus-per" in word]


def test_sbatch_gets_a_script_that_asks_for_gpus_once(tmp_path: Path) -> None:
    """SLURM 26.05 refuses --gres=gpu beside --gpus-per-node, wherever the two stand."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/bash\nfor word; do case $word in *.sh) cat "$word" ;; esac; done; echo "$MSER_SITE"\n')
    sbatch.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MSER", "SLURM"))}
    words = ["slurm/submit.sh", "--site=slurm/sites/pyxis.sh", "slurm/stage1.sh", "a=b"]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=clean | path, check=True)
    asked = [line for line in done.stdout.splitlines() if line.startswith("#SBATCH") and "gpus-per" in line]
    assert not asked and "#SBATCH --signal=USR2@180" in done.stdout
    assert done.stdout.splitlines()[-1] == str(ROOT / "slurm/sites/pyxis.sh"), "the job needs it from any folder"


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--site=none.sh", "--show", "slurm/stage1.sh"], "give the path of a site file"),
        (["--nodes=2", "slurm/stage9.sh"], "no job script slurm/stage9.sh"),
        (["--nodes=2", "my_stage1.yaml"], "no job script among the words"),
        (["--gpus-per-node", "8", "slurm/stage1.sh"], "in one word"),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(words: list[str], remedy: str) -> None:
    said = submit(*words, code=2)
    assert len(said) == 1 and remedy in said[0]


def test_a_site_file_with_a_mistake_is_refused_by_both(tmp_path: Path) -> None:
    file = tmp_path / "mine.sh"
    for text, said in (
        ("SITE_PARTITION=gpu\n", "SITE_PARTITION"),
        ("no_such_command\n", "no_such_command"),
    ):
        file.write_text(text)
        lines = submit("--show", "slurm/stage1.sh", code=2, MSER_SITE=str(file))
        assert said in " ".join(lines)
        with pytest.raises(UserError, match=said):
            site.read(file)
    file.write_text("SITE_SBATCH=('-p gpu')\n")
    with pytest.raises(UserError, match=r"'-p gpu' is no option of sbatch in one word"):
        site.read(file).options(0)
    with pytest.raises(UserError, match="there is no site file"):
        site.read(tmp_path / "none.sh")


def test_a_container_is_asked_and_slurm_told_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `mser requeue --state` answers: 75 only where another start is of use, also for a code of 75 itself."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue, as in a container
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert requeue(75, tmp_path / "a", "CANCELLED") == 1
    assert requeue(2, tmp_path / "a", "RUNNING") == 1
    assert [requeue(1, tmp_path / "a", "RUNNING") for _ in range(3)] == [75, 75, 1]
    assert "failed 3 times at step 0" in capsys.readouterr().err


@pytest.mark.parametrize(("fails", "kind"), [(False, "pyxis"), (False, "apptainer"), (True, "pyxis")])
def test_a_container_is_entered_by_srun_or_in_each_task(fails: bool, kind: str, tmp_path: Path) -> None:
    """The real site files but for `site_begin`; the `srun` that is found prints its words, and may end as a crash."""
    file = tmp_path / "mine.sh"
    file.write_text(f"source {ROOT}/slurm/sites/{kind}.sh\nsite_begin() {{ export MSER_CHECK=0; }}\n")
    for name, lines in {"squeue": "echo 1 1 RUNNING", "apptainer": "exit 3"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    env = {"MSER_SITE": str(file), "MSER": "/none"} | ({"MSER_SRUN_CODE": "1"} if fails else {})
    done = run_job_script("stage1", tmp_path, ["demo_stage1"], ROOT, **env)
    said = done.stdout.splitlines()
    command = ["/opt/mser/bin/mser", "train", "demo_stage1"]
    task = [str(ROOT / "slurm/task.sh")]
    if kind == "pyxis":
        assert "--container-image=/images/mser.sqsh" in said and f"--container-mounts={ROOT},{tmp_path},/data" in said
        assert said[said.index(task[0]) :][:4] == [*task, *command]
    else:
        assert said[said.index(task[0]) + 1 :][:3] == ["apptainer", "exec", "--nv"]
        at = said.index("/images/mser.sif")
        assert said[at + 1 : at + 4] == command
    asked = [line for line in said if line == "requeue"]
    assert done.returncode == (1 if fails else 0), done.stderr
    assert bool(asked) == fails and (not fails or {"--overlap", "--state=RUNNING"} <= set(said))


def text(name: str) -> str:
    return (CONTAINERS / name).read_text(encoding="utf-8")


def test_both_images_have_one_base_and_one_way_to_install() -> None:
    bases = {*re.findall(r"BASE=(\S+)", text("Dockerfile")), *re.findall(r"BASE=(\S+)", text("apptainer.def"))}
    assert len(bases) == 1 and re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu24\.04", bases.pop())
    for recipe in ("Dockerfile", "apptainer.def"):
        assert "bash /opt/mser_dist/slurm/containers/install.sh" in text(recipe)
        assert not re.search(r"pip install|==", text(recipe)), "what is pinned is pinned in constraints.txt"
    assert 'make -C "$here" install VENV=/opt/mser' in text("install.sh") and "pip install" not in text("install.sh")
    cuda = re.search(r"\+cu(\d+)\)", (ROOT / "constraints.txt").read_text())
    assert cuda and re.search(rf"BASE=nvidia/cuda:{cuda[1][:2]}\.{cuda[1][2:]}\.", text("Dockerfile")), "torch's CUDA"


def test_both_images_get_what_the_installation_reads() -> None:
    copied = set(re.findall(r"^COPY (.*) \S+$", text("Dockerfile"), re.MULTILINE))
    names = {name for words in copied for name in words.split()}
    files = re.search(r"%files\n(.*?)\n\n", text("apptainer.def"), re.DOTALL)
    assert files and {line.split()[0] for line in files[1].splitlines()} == names
    assert all((ROOT / name).exists() for name in names)
    assert {"pyproject.toml", "constraints.txt", "Makefile", "mser_dist", "ds_configs"} <= names
