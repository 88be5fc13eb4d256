"""Every command in the README and the job scripts' page is one that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest

from mser_dist.cli import main as cli
from mser_dist.config.file import load_evaluation, load_training

ROOT = Path(__file__).parents[2]
NOUNS = {"mser train", "mser pack", "mser submit"}  # the commands as such, in a sentence


def commands() -> list[str]:
    """`mser …` lines of code blocks and of inline code, placeholders filled in."""
    found = []
    for page in (ROOT / "README.md", ROOT / "slurm/README.md"):
        text = page.read_text(encoding="utf-8")
        found += re.findall(r"^mser [^\n#]*", text, re.MULTILINE) + re.findall(
            r"`((?:torchrun[^`]*-m )?mser[_ ][^`]*)`", text
        )
    filled = {command.strip().replace("CONFIG", "demo_stage1") for command in found}
    return sorted(
        command
        for command in filled
        if re.match(r"(torchrun .*)?mser(_dist)? [a-z]+ |mser \w+$", command) and command not in NOUNS
    )


def test_there_are_commands() -> None:
    assert len(commands()) >= 10


@pytest.mark.parametrize("command", commands())
def test_the_command_line_takes_it(command: str) -> None:
    words = shlex.split(re.sub(r"^.*?mser(_dist)? ", "", command))
    if words[-1] in ("…", "[key=value …]"):
        words.pop()
    options, rest = cli._parser().parse_known_args(words)
    assert not [word for word in rest if word.startswith("-")]
    if words[0] in ("train", "eval") and getattr(options, "config", None):
        (load_training if words[0] == "train" else load_evaluation)(options.config, [*options.words, *rest])


def test_the_readmes_files_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(
        r"^(mser_dist/\S+?)\s{2,}", text, re.MULTILINE
    ):
        assert (ROOT / name.rstrip(",")).exists(), name
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) or target in ("alone",), target
