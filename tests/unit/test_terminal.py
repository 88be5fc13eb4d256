"""A terminal or job log without UTF-8, as on clusters with LANG=C: output degrades, and ends nothing."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mser_dist import audio
from mser_dist.cli import main as cli
from tests.tiny_runs import ENCODER, QFORMER

ROOT = Path(__file__).resolve().parents[2]
NOT_UTF8 = {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
RUN = ["data.sets=set", "data.labels=[happy,sad]", "data.workers=0", "tracking.enabled=false"]
TRAIN = [ENCODER, *QFORMER, "train.global_batch=4", "train.micro_batch=2", "train.steps=1", "data.val_split=null"]
EVAL = ["data.labels=[happy,sad,fear]", "stage1=stage1", "stage2=null"]
# In order: later ones use what earlier ones made.
COMMANDS = [
    ["config"],
    ["config", "demo_stage1", "out=Опыт"],
    *(["config", "--keys", kind] for kind in ("stage1", "stage2", "eval")),
    ["pack", "manifest", "list.csv", "set"],
    ["inspect", "set", "--json", "set.json", "--out", "plots"],
    ["verify", "set"],
    ["train", "demo_stage1", *RUN, *TRAIN, "out=stage1"],
    ["eval", "demo_eval", *RUN, *EVAL, "out=eval"],
    ["compare", "eval", "stage1", "--out", "Вывод"],
    ["report", "eval", "--audio", "--out", "Отчёт.html"],
    ["predict", "stage1", "c0.wav", "--labels", "радость,грусть", "--json", "ответ.json"],
    ["predict", "stage1", "c0.wav", "--labels", "радость,грусть"],
    ["export", "stage1", "вывод"],
    ["check", "demo_stage1", *RUN, *TRAIN, "out=Опыт"],
    ["submit", "demo_stage1", *RUN, *TRAIN, "out=Опыт", "--dry-run"],
    ["sweep", "demo_stage1", *RUN, "out=Опыт", "seed=1,2", "--dry-run"],
    ["doctor", "--no-ranks"],
]
DRIVER = """
import json, sys
from mser_dist.cli import main as cli
for words in json.loads(sys.stdin.read()):
    print("mser", *words, flush=True)
    code = cli.main(words)
    print("code", code, flush=True)
"""


def write_corpus(folder: Path) -> None:
    """A manifest with words of another script in every field; two of its clips are the same."""
    lines = ["path,emotion,language,speaker,corpus,split"]
    for i in range(16):
        name, noise = f"c{i}.wav", np.random.default_rng(i % 15).integers(-3000, 3000, 8000).astype(np.int16)
        (folder / name).write_bytes(audio.encode(noise, 16000, "wav"))
        emotion, split = ("радость", "грусть")[i % 2], ("train", "test")[i // 8]
        lines.append(f"{name},{emotion},ru,дух{i % 4},{('Дуся', 'Реса')[i // 4 % 2]},{split}")
    (folder / "list.csv").write_text("\n".join(lines), encoding="utf-8")


def test_every_command_goes_to_its_end(tmp_path: Path) -> None:
    """One process for all of them, so that torch is imported once."""
    write_corpus(tmp_path)
    env = {**os.environ, **NOT_UTF8, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning:mser_dist", "-c", DRIVER]
    words = json.dumps(COMMANDS).encode()  # escapes alone: the process reads by its own encoding
    done = subprocess.run(command, input=words, capture_output=True, env=env, cwd=tmp_path)
    said, error = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    assert done.returncode == 0 and "Traceback" not in error, error
    codes = [line for line in said.splitlines() if line.startswith("code ")]
    # The doctor may find something wrong here.
    assert codes[:-1] == ["code 0"] * (len(COMMANDS) - 1) and len(codes) == len(COMMANDS), said + error
    assert "????" in said and "---" in said
    assert "warning: identical audio in more than one split" in said
    assert "no clip has the label fear" in error
    line, _ = (tmp_path / "eval/log.jsonl").read_text(encoding="utf-8").splitlines()
    assert {"ua/stage1/Дуся/ru", "ua/stage1/Реса/ru"} <= json.loads(line).keys(), "a metric for each row"
    assert "Дуся" in (tmp_path / "eval/table.txt").read_text(encoding="utf-8")
    assert "report.html" in json.loads((tmp_path / "eval/mlflow.json").read_text(encoding="utf-8"))["artifacts"]
    for page in ("eval/report.html", "Отчёт.html"):
        assert "Дуся" in (tmp_path / page).read_text(encoding="utf-8")
    report = json.loads((tmp_path / "eval/report.json").read_text(encoding="utf-8"))
    assert [row["chance"] for row in report["zero_shot"]] == [0.5, 0.5]
    assert any(line.startswith("no clip has the label fear") for line in report["warnings"])
    assert any(line.startswith("leaks: ru of Дуся: stage 1 heard 4 of its 4 speakers") for line in report["warnings"])


def verbs() -> list[str]:
    from mser_dist.cli.main import _parser

    (actions,) = [action for action in _parser()._actions if isinstance(action.choices, dict)]
    return sorted(actions.choices or ())


def test_every_verb_is_walked_through_or_has_its_help_shown(tmp_path: Path) -> None:
    # demo is synth, train and eval, and so is folds; requeue needs a SLURM, sync an MLflow, push a hub, synth eSpeak,
    # features and baseline a frozen encoder, translate a voice, and plan rehearses DeepSpeed: they take long or say
    # little.
    shown = {"baseline", "demo", "features", "folds", "plan", "push", "requeue", "sync", "synth", "translate"}
    assert {*verbs()} - {words[0] for words in COMMANDS} == shown
    code = (
        "import sys\nfrom mser_dist.cli.main import main\nfor words in [[], *([verb] for verb in sys.argv[1:])]:\n"
        "    try: main([*words, '--help'])\n    except SystemExit as end: assert not end.code"
    )
    env = {**os.environ, **NOT_UTF8, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *verbs()], capture_output=True, env=env)
    assert done.returncode == 0 and done.stdout.isascii() and not done.stderr, done.stderr
    assert done.stdout.count(b"usage: mser ") == 1 + len(verbs())


def test_from_python_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody has gone through the command line; behind it, standard output is as it was."""
    import io

    from mser_dist import tables

    log = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", log)
    with tables.showing_what_can_be():
        print("2 × 3")
    assert log.errors == "strict"
    with pytest.raises(UnicodeEncodeError):
        print("2 × 3")


def test_a_message_of_another_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path / "нет")]) == 2
    assert "нет" in capsys.readouterr().err


SOURCES = [path for folder in ("mser_dist", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_read_and_written_in_an_encoding_that_is_named(path: Path) -> None:
    """The machine's own may lack letters: a file of another script would end the command that writes it."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        words = {word.arg: word.value for word in call.keywords}
        modes = [arg.value for arg in [*call.args, words.get("mode")] if isinstance(arg, ast.Constant)]
        mode = next((m for m in modes if isinstance(m, str) and set(m) <= set("rwaxbt+")), None)
        text = name in ("read_text", "TextIOWrapper")
        text |= name == "write_text" and isinstance(call.func, ast.Attribute)
        text |= name in ("open", "fdopen") and ((mode is not None and "b" not in mode) or not (call.args or words))
        text |= name in ("NamedTemporaryFile", "TemporaryFile") and mode is not None and "b" not in mode
        text |= name in ("run", "Popen", "check_output") and "text" in words
        assert not text or "encoding" in words, f"{path}:{call.lineno}: {name} without an encoding"
