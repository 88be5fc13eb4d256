"""README, CONTRIBUTING and the manuals are true: every command is taken by the parser that will get it, every file is
there, the README's Python runs, its table is as `mser eval` prints it, and every room says what lives in it."""

import argparse
import ast
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import numpy as np
import pytest
import yaml

from mser_dist import __version__
from mser_dist.audio import SAMPLE_RATE, encode
from mser_dist.cli import main as cli
from mser_dist.config.file import PRESETS, load_any, load_baseline, load_evaluation, load_training, to_yaml
from mser_dist.evaluation.report import zero_shot_table
from mser_dist.jobs import launch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mser_dist"
README = ROOT / "README.md"
MANUALS = sorted(PACKAGE.glob("*/README.md"))
COOKBOOK = PACKAGE / "evaluation/COOKBOOK.md"
SLURM_PAGES = sorted((ROOT / "slurm").rglob("README.md"))
PAGES = [README, COOKBOOK, ROOT / "CONTRIBUTING.md", *SLURM_PAGES, ROOT / "ds_configs/README.md", *MANUALS]
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
# First words of lines that are other programs' own.
OTHERS = ("source", "bash", "cp", "export", "apt-get", "squeue;", ".venv/bin/pre-commit")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- commands


def lines_of_code(text: str) -> Iterator[str]:
    """The lines of shell code blocks, fenced as bash or indented by four spaces, without comments."""
    fence = None
    for line in text.splitlines():
        if line.startswith("```"):
            fence = line if fence is None else None
        elif fence == "```bash" or (fence is None and re.match(r" {4}[a-z]", line) and "→" not in line):
            command = re.sub(r"(^|\s+)#.*", "", line).strip()
            yield re.sub(r"^\w+=\$\((.*)\)$", r"\1", command)  # job=$(sbatch …)


def inline_code(text: str) -> Iterator[str]:
    """Commands within sentences; one may be broken over two lines."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", prose):
        if re.match(r"(mser|make|sbatch|torchrun|python|bash|tools/\S+) ", code):
            yield " ".join(code.split())


def commands() -> list[tuple[str, str, bool]]:
    """(page, command, whether it stands in a code block)."""
    found: dict[tuple[str, str, bool], None] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for line in lines_of_code(text):
            if line and line.split()[0] not in OTHERS:
                found[name(page), line, True] = None
        for code in inline_code(text):
            found[name(page), code, False] = None
    return list(found)


def placeholders(command: str, preset: str = "demo_stage1") -> list[str]:
    """The words of a command with real ones for its placeholders: what stands in brackets is optional."""
    command = re.sub(r" \[[^\]]*[ …][^\]]*\]|\[CONFIG\]| …", "", command)
    for placeholder, word in (("CONFIG", preset), ("JOBID", "12"), ("CORPUS", "emodb"), ("CODE", "75")):
        command = re.sub(rf"\b{placeholder}\b", word, command)
    return shlex.split(command)


@pytest.fixture
def my_configs() -> None:
    """The config files of which the pages speak as the reader's own, in the working folder."""
    for kind in ("stage1", "stage2", "eval"):
        Path(f"my_{kind}.yaml").write_text((PRESETS / f"demo_{kind}.yaml").read_text())


def take(words: list[str], in_a_sentence: bool = False) -> None:
    """Give the words of a `mser` command to its parser, load its config, and show the job that it would submit."""
    parser = cli._parser()
    if in_a_sentence and len(words) == 1:  # the command as such: "`mser pack` goes on where it was interrupted"
        assert words[0] in parser.format_help()
        return
    options, rest = parser.parse_known_args(words)
    assert not [word for word in rest if word.startswith("-")], words
    if words[0] == "features":
        load_any(options.config, options.words)
    elif words[0] in ("train", "eval"):
        (load_training if words[0] == "train" else load_evaluation)(options.config, [*options.words, *rest])
    elif words[0] == "baseline":
        load_baseline(options.config, options.on, [*options.words, *rest], options.only)
    elif words[0] == "config" and options.config:
        load_any(options.config, options.words)
    elif words[0] in ("check", "submit", "sweep"):
        dry = [] if words[0] == "check" else ["--dry-run"]
        with patch("mser_dist.jobs.check.check", return_value=[]):  # what the reader has is not here
            assert cli.main([*(word for word in words if word != "--wait"), *dry]) == 0


def take_sbatch(words: list[str]) -> None:
    options = [word for word in words if word.startswith("--")]
    if "--wrap" in options or (len(words) == 1 and options):
        return
    script, *arguments = [word for word in words if not word.startswith("--")] or ["slurm/stage1.sh"]
    assert (ROOT / script).is_file() or script == "job.sh", script
    if script in ("slurm/pack.sh", "slurm/translate.sh"):
        take([Path(script).stem, *arguments])
    elif script.startswith("slurm/"):
        kind = Path(script).stem
        verb = kind if kind in ("eval", "features") else "train"
        take([verb, *(arguments or ["demo_stage1" if kind == "features" else f"demo_{kind}"])])


class _ParsedError(Exception):
    pass


def take_tool(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a measuring script up to where its own parser has taken its words."""
    spec = importlib.util.spec_from_file_location("tool", ROOT / words[0])
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec.loader.exec_module(tool)
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(self: argparse.ArgumentParser, *args: Any) -> NoReturn:
        parse(self, *args)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(_ParsedError):
        tool.main()


def test_there_are_commands() -> None:
    assert sum(page == "README.md" for page, _, _ in commands()) >= 18
    assert len(commands()) >= 60


@pytest.mark.usefixtures("my_configs")
@pytest.mark.parametrize(("page", "command", "block"), commands())
def test_a_command_is_taken(page: str, command: str, block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = re.search(r"slurm/(stage1|stage2|eval)\.sh", command)
    words = placeholders(command, f"demo_{sbatch[1]}" if sbatch else "demo_stage1")
    match words:
        case ["mser" | "srun", *rest]:
            take([word for word in rest if word != "mser"], in_a_sentence=not block)
        case ["torchrun", *rest]:
            from torch.distributed.run import get_args_parser

            options = get_args_parser().parse_args(rest)
            assert options.module and options.training_script == "mser_dist"
            take(options.training_script_args)
        case ["sbatch" | "slurm/submit.sh", *rest]:
            take_sbatch(rest)
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            for target in targets:
                assert re.search(rf"^{target.partition('=')[0]}\b *(:|\?=)", makefile, re.MULTILINE), target
        case ["python", *rest]:
            take_tool(rest, monkeypatch)
        case ["mlflow", "ui", *rest]:
            from mlflow.cli import cli as mlflow

            server = mlflow.get_command(None, "ui")
            assert server.make_context("ui", rest).params["backend_store_uri"].startswith("sqlite:///")
        case ["tools/local_slurm.sh" | "tools/mlflow_server.sh" | "eval", *_]:
            named = re.search(r"tools/(\w+)\.sh (\w+)", command)
            assert named, command
            script, verb = (ROOT / f"tools/{named[1]}.sh").read_text(encoding="utf-8"), named[2]
            assert re.search(rf"^ *(\w+ \| )*{verb}( \| \w+)*\) (verb=|{verb} ;;)", script, re.MULTILINE), verb
        case ["bash", script, *_]:
            assert (ROOT / script).is_file()
        case _:
            pytest.fail(f"{page}: nothing here tests `{command}`")


# ---- the README's Python


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_readmes_python_runs(tiny_set: Path, prepared: Path) -> None:
    """As it stands, on a set and configs that are small; nothing of it is left out but the jobs for a cluster."""
    from tests.tiny_runs import stage1

    Path("shards").mkdir()
    Path("shards/mine").symlink_to(tiny_set)
    _, preset, *words = stage1("runs/x", "data.sets=shards/mine", "train.steps=2", "train.val_every=0")
    Path("runs").mkdir()
    shutil.copy(prepared, "runs/mlflow.db")
    Path("my_stage1.yaml").write_text(to_yaml(load_training(preset, words)))
    Path("my_eval.yaml").write_text("stage1: runs/x\ndata: {sets: [shards/mine], workers: 0}\nout: runs/evaluation\n")
    script = "\n".join(block for block in python_blocks() if "submit" not in block)
    for name in ("x.wav", "y.flac"):
        wave = np.random.default_rng(0).integers(-2000, 2000, SAMPLE_RATE, dtype=np.int16)
        Path(name).write_bytes(encode(wave, SAMPLE_RATE, name.split(".")[1]))
    for offered in ("load_config", "train", "evaluate", "load_model", "open_set", "contrastive_loss"):
        assert f"mser_dist.{offered}(" in script
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert "0.0003 ['shards/mine']" in done.stdout
    assert "[('el', " in done.stdout and "torch.Size([8, " in done.stdout
    assert Path("runs/one/summary.json").is_file() and Path("runs/evaluation/predictions.parquet").is_file()


@pytest.mark.usefixtures("my_configs")
def test_the_readmes_jobs_are_what_sbatch_would_get() -> None:
    [block] = [block for block in python_blocks() if "submit" in block]
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    submits = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "submit"]
    assert len(submits) == 2
    for call in submits:
        arguments = [ast.literal_eval(argument) for argument in call.args]
        named = {k.arg: "12" if k.arg == "after" else ast.literal_eval(k.value) for k in call.keywords if k.arg}
        bound = inspect.signature(launch.submit).bind(*arguments, **named).arguments
        config = launch.resolve(bound["config"], bound.get("overrides", ()))
        need = launch.Resources(**bound["resources"])
        text = launch.script([config], need, name=launch.job_name(config), after=bound.get("after"))
        assert f"--nodes={named['nodes']}" in text and "--gpus-per-node=8" in text
        assert ("afterok:12" in text) == ("after" in named)


# ---- what it shows and links


def test_the_demos_table_is_as_eval_prints_it() -> None:
    """Only the numbers may differ from run to run; when they are taken again, the lines are to be pasted."""
    [block] = re.findall(r"^```\n(model .*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    rows: list[dict[str, Any]] = []
    for line in block.splitlines()[2:]:
        found = re.match(r"stage (\d)( adapted)? +(.*)", line)
        if not found or "mean over" in line:
            continue
        stage, adapted, rest = found.groups()
        _, language, zero_shot, *on, n, chance, ua, between, wa, f1 = rest.split()
        low, high = map(float, between.split("–"))
        row = {"model": f"stage{stage}{'_adapted' if adapted else ''}", "corpus": "m5ser-espeak", "language": language}
        row |= {
            "seen_language": False,
            "zero_shot": zero_shot == "yes",
            "adapted_on": int(on[0]) if on else None,
            "n": int(n),
        }
        row |= {"chance": float(chance), "ua": float(ua), "ua_low": low, "ua_high": high}
        rows.append({**row, "wa": float(wa), "macro_f1": float(f1)})
    whole = str(zero_shot_table(rows)).splitlines()
    # The means are of more languages than are shown, and their intervals of more digits.
    numbers = re.compile(r"\d\.\d{3}  \d\.\d\d–\d\.\d\d$")
    means = [numbers.sub("", line) for line in block.splitlines() if "unseen" in line or "mean over" not in line]
    assert means == [numbers.sub("", line) for line in whole]


def test_the_readme_is_short() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 175
    assert not [line for line in lines if len(line) > 120]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        assert (page.parent / link).exists(), link


def test_the_readme_leads_to_every_manual() -> None:
    text = README.read_text(encoding="utf-8")
    for manual in [*MANUALS, ROOT / "slurm/README.md", ROOT / "ds_configs/README.md"]:
        assert f"({name(manual)})" in text, name(manual)


def test_the_two_pictures_differ_in_colours_alone() -> None:
    light, dark = ((ROOT / f"tools/picture/system-{how}.svg").read_text(encoding="utf-8") for how in ("light", "dark"))
    assert re.sub("#[0-9a-f]{6}", "", light) == re.sub("#[0-9a-f]{6}", "", dark)
    assert light != dark and not re.search("<script|href|<image", light)


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and citation["cff-version"] == "1.2.0"
    [paper] = citation["references"]
    assert paper["url"].endswith("2503.21806") and len(paper["authors"]) == 5


# ---- the rooms


@pytest.mark.parametrize("room", ROOMS, ids=name)
def test_a_room_says_what_lives_there(room: Path) -> None:
    said = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
    assert said and len(said.split()) >= 6


@pytest.mark.parametrize("manual", MANUALS, ids=name)
def test_a_manual_lists_the_files_of_its_room(manual: Path) -> None:
    cells = re.findall(r"^\| (`[^|]*) \|", manual.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {file for cell in cells for file in re.findall(r"`(\w+\.py)`", cell)}
    assert listed == {path.name for path in manual.parent.glob("*.py")} - {"__init__.py"}


def test_the_rooms_of_contributing_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[?`(\w+)/`", page, re.MULTILINE)
    assert listed == [layer for layer in layers if (PACKAGE / layer).is_dir()]
    for file in re.split(" : ", layers[-1]):
        assert f"`{file}.py`" in page, file


def test_the_glossarys_names_are_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    glossary = page[page.index("## Glossary") : page.index("## Tests")]
    names = re.findall(r"`(\w+(?:\.\w+)*)\.([A-Z]\w+)`", glossary)
    assert len(names) >= 12
    for module, thing in names:
        path = PACKAGE / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert re.search(rf"\b{thing}\b", file.read_text(encoding="utf-8")), f"{module}.{thing}"
