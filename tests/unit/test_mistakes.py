"""Mistakes of a new user: each is one line on stderr that says what is wrong, where, and how to mend it; nothing is
written, nothing is traced back, and the exit code is 2."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from mser_dist import audio
from mser_dist.cli import main as cli
from mser_dist.ranks import distributed
from mser_dist.shards.writer import DatasetWriter
from tests.unit.made_up_set import meta, pcm

FILES = {
    "my1.yaml": "stage: 1\nout: r1\ndata: {sets: [set], labels: [happy, sad], val_split: null, workers: 0}\n",
    "my2.yaml": "stage: 2\nstage1: r1\nout: r2\ndata: {sets: [set], labels: [happy, sad], val_split: null}\n",
    "ev.yaml": "stage1: r1\nout: e1\ndata: {sets: [set], labels: [happy, sad]}\n",
    "run/config.yaml": "stage: 2\n",
    "empty.yaml": "",
    "comment.yaml": "# train: {lr: 1}\n",
    "list.yaml": "- stage\n- 1\n",
    "text.yaml": "just words\n",
    "nospace.yaml": "stage:1\n",
    "tabs.yaml": "stage: 1\ntrain:\n\tlr: 1\n",
    "two.yaml": "stage: 1\n---\nstage: 2\n",
    "nocolon.yaml": "stage: 1\nout runs/x\n",
    "tag.yaml": "stage: 1\nout: !env HOME\n",
    "braces.yaml": "stage: 1\nout: {{ out }}\n",
    "cut.json": '{"stage": 1',
    "word.yaml": "stage: align\n",
    "nostage.yaml": "data: {sets: [set]}\n",
    "flat.yaml": "stage: 1\ntrain.lr: 1e-3\n",
    "noend.yaml": "stage: 1\ntrain:\n",
    "list_lr.yaml": "stage: 1\ntrain: {lr: [1, 2]}\n",
    "home.yaml": "stage: 1\nout: ~/runs\n",
    "variable.yaml": "stage: 1\nout: runs/x\ndata: {sets: ['${DATA}/set']}\n",
    "a.txt": "x",
    "my1.txt": "",
}
LONG = "x" * 300


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set, configs, and what is none."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "folder.yaml").mkdir()
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    with DatasetWriter(folder / "set", "made-up", {"seed": 0}) as writer:
        for i in range(8):
            label = "happy" if i % 2 else "sad"
            writer.write("train", f"k{i}", audio.encode(pcm(i), 16000, "wav"), "wav", meta(i, label=label))
    return folder


# What is typed behind `mser`, and what the one line says.
MISTAKES = r"""
                                        | the following arguments are required: VERB (`mser --help` shows how)
fly                                     | there is no verb 'fly': first comes one of demo, train, eval,
trian my1.yaml                          | did you mean `mser train`?
Eval ev.yaml                            | did you mean `mser eval`?
my1.yaml                                | there is no verb 'my1.yaml'
--train                                 | required: VERB
train                                   | required: CONFIG (`mser train --help` shows how)
train --nproc 2                         | required: CONFIG
train my1.yaml --nproc two              | argument --nproc: invalid int value: 'two' (`mser train --help` shows how)
train my1.yaml --nproc                  | argument --nproc: expected one argument
train my1.yaml --nproc 0                | --nproc must be 1 or more
train my1.yaml --seed=3                 | mser train has no option --seed=3: a key is set without dashes, seed=3 (
train my1.yaml --seed 3                 | has no option --seed: a key is set without dashes, seed=3 (
train my1.yaml --train.lr 3e-4          | train.lr=3e-4 (`mser train --help` lists the options)
train my1.yaml -seed 3                  | seed=3
train my1.yaml --fast                   | mser train has no option --fast
train my1.yaml seed: 3                  | 'seed:' is not key=value: write one word without spaces around the =
train my1.yaml seed:3                   | 'seed:3' is not key=value: write one word without spaces around the =, seed=3
train my1.yaml seed =3                  | 'seed' is not key=value: write one word without spaces around the =
train my1.yaml seed = 3                 | 'seed' is not key=value: write one word without spaces
train my1.yaml =3                       | '=3' is not key=value
train my1.yaml ''                       | '' is not key=value
train my1.yaml train..lr=3              | 'train..lr=3' is not key=value
train my1.yaml my2.yaml                 | 'my2.yaml' is not key=value: a command takes one config, which comes first
train seed=3 my1.yaml                   | 'seed=3' stands where the config is to be named: first CONFIG, then the
train my1.yaml,seed=3                   | first CONFIG, then the key=value words
train my1.yaml lr=3e-4                  | 'lr=3e-4': unknown key lr: did you mean train.lr?
train my1.yaml train.LR=3e-4            | did you mean train.lr?
train my1.yaml train/lr=3e-4            | did you mean train.lr?
train my1.yaml learning_rate=1          | did you mean train.lr?
train my1.yaml batch_size=4             | did you mean train.global_batch?
train my1.yaml sets=set                 | did you mean data.sets?
train my1.yaml llm.freeze=true          | 'llm.freeze=true': llm is a key of stage 2, not of stage 1: leave it out
train my1.yaml train=3                  | 'train=3': train is a section of keys, not 3
train my1.yaml train.lr.x=3             | 'train.lr.x=3': train.lr must be of type float
train my1.yaml train.lr=[1,2]           | 'train.lr=[1,2]': train.lr must be of type float
train my1.yaml seed=                    | 'seed=': seed must be of type int, not null (no value)
train my1.yaml seed=one                 | seed must be of type int, not 'one'
train my1.yaml data.sets=3              | data.sets must be a list, not 3
train my1.yaml data.sets=[set           | 'data.sets=[set': the value is not valid YAML: expected ',' or ']'
train my1.yaml 'out=!!int [x]'          | 'out=!!int [x]': the value is not valid YAML
train my1.yaml 'out=~/x'                | 'out=~/x': out is '~/x', and ~ and $VARIABLES are not filled in
train my1.yaml 'out=$HOME/x'            | write the whole path, or let the shell do it
train my1.yaml stage=2                  | 'stage=2': my1.yaml is a config of stage 1, and each stage has keys of its own
train my2.yaml stage=1                  | give a config of stage 1 (`mser config` lists presets)
train my1.yaml stage=3                  | stage is 3: set `stage: 1` (align) or `stage: 2` (instruct)
train my1.yaml stage=                   | my1.yaml: stage is missing: set `stage: 1`
train ev.yaml                           | ev.yaml: this is a config for mser eval: give it to `mser eval`
train demo_eval                         | preset demo_eval: this is a config for mser eval: give it to `mser eval`
train ev.yaml stage=1                   | stage1 is a key of stage 2 and of an evaluation (mser eval), not of stage 1
eval my1.yaml                           | my1.yaml: this is a config for mser train (it sets `stage`): give it to
eval demo_stage2                        | preset demo_stage2: this is a config for mser train
eval run/config.yaml                    | to evaluate its run: mser eval demo_eval stage2=run
eval ev.yaml stage=1                    | 'stage=1': an evaluation has no key stage: name the runs by stage1=RUN
eval ev.yaml stage1=null                | name the run folder of a finished run
eval stage1=r1                          | 'stage1=r1' stands where the config is to be named
eval ev.yaml train.lr=1                 | train is a key of stage 1 and of stage 2, not of an evaluation
train no_such.yaml                      | 'no_such.yaml': the file does not exist
train demo_stage1.yaml                  | 'demo_stage1.yaml': the file does not exist, did you mean the preset
train nowhere/demo_stage1               | the file does not exist, did you mean the preset demo_stage1?
train my1                               | no config file or preset 'my1': did you mean my1.yaml?
train my1.yml                           | the file does not exist, did you mean my1.yaml?
train demo_stage                        | did you mean the preset demo_stage2 or the preset demo_stage1?
train zzz                               | give a YAML file, or one of the presets: demo_eval,
train ''                                | the name of the config is empty
train .                                 | '.': it is a folder: give a YAML file or a preset
train run                               | 'run': it is the folder of a run, did you mean run/config.yaml?
eval set                                | 'set': it is a set of shards: give a config first, and the set as
train /dev/null                         | '/dev/null': it is not a regular file
train LONG                              | File name too long: name another path
train folder.yaml                       | 'folder.yaml': it is a folder
train empty.yaml                        | empty.yaml: the file is empty
train comment.yaml                      | comment.yaml: the file is empty
train list.yaml                         | a config is a mapping of `key: value` lines, with a space behind the colon,
train text.yaml                         | not 'just words'
train nospace.yaml                      | with a space behind the colon, not 'stage:1'
train tabs.yaml                         | tabs.yaml:3: not valid YAML: found character '\t' that cannot start any
train two.yaml                          | two.yaml:2: not valid YAML: a second document begins
train nocolon.yaml                      | nocolon.yaml:3: not valid YAML: could not find expected ':'
train tag.yaml                          | tag.yaml:2: not valid YAML: could not determine a constructor for the tag
train braces.yaml                       | braces.yaml:2: not valid YAML: found unhashable key: put a value that begins
train cut.json                          | cut.json:1: not valid YAML
train binary.yaml                       | binary.yaml: not a YAML text file
train set/train-000000.tar              | not a YAML text file
train word.yaml                         | stage is 'align': set `stage: 1` (align)
train nostage.yaml                      | nostage.yaml: stage is missing: set `stage: 1`
train flat.yaml                         | flat.yaml: unknown key train.lr: in a file, write train: {lr: …}
train noend.yaml                        | noend.yaml: train is a section of keys, not null (no value)
train list_lr.yaml                      | list_lr.yaml: train.lr must be of type float, not [1, 2]
train home.yaml                         | home.yaml: out is '~/runs', and ~ and $VARIABLES are not filled in
train variable.yaml                     | data.sets is '${DATA}/set', and ~ and $VARIABLES are not filled in
train my1.yaml data.sets=nowhere        | nowhere: no such data set; give a folder of shards or a .tar
train my1.yaml data.sets=set/*.tar      | set/*.tar: no such data set, and patterns are not filled in; give the folder
train my1.yaml data.sets=run            | run: holds no .tar shard
train my1.yaml data.sets=my1.yaml       | my1.yaml: neither a folder of shards nor a .tar
train my1.yaml data.max_seconds=0.1065  | lasts 0.1 s, more than data.max_seconds=0.1065: leave them out
train my1.yaml data.max_seconds=0.1055  | more than data.max_seconds=0.1055, as does 1 other: leave
train my1.yaml data.max_seconds=0.1045  | more than data.max_seconds=0.1045, as do 2 others: leave
train my1.yaml init_from=nowhere        | init_from=nowhere: there is no such run folder
train my1.yaml init_from=set            | init_from=set: the run has no finished export
train my1.yaml out=set                  | set holds a set of shards: choose another folder for the run with out=…
train my1.yaml out=a.txt                | cannot write to the folder a.txt: File exists: choose another with out=…
train my1.yaml out=a.txt/x              | cannot write to the folder a.txt/x: Not a directory
train my1.yaml out=q encoder.arch={x:}  | does not describe a whisper encoder: unknown field x
train my1.yaml out=q encoder.pretrained=set encoder.arch={} | cannot load the pretrained model 'set'
train my2.yaml stage1=nowhere           | stage1=nowhere: there is no such run folder
train my2.yaml stage1=my1.yaml          | stage1=my1.yaml: there is no such run folder
eval ev.yaml stage1=set                 | stage1=set: the run has no finished export
config no_such.yaml                     | the file does not exist
config run                              | did you mean run/config.yaml?
config --keys                           | argument --keys: expected one argument
config --keys stage3                    | invalid choice: 'stage3' (choose from 'stage1', 'stage2', 'eval', 'translate')
config my1.yaml --keys stage1           | --keys explains a kind of config, and 'my1.yaml' is one to print: give either
demo extra                              | mser demo does not take 'extra'
demo seed=3                             | mser demo does not take 'seed=3': `mser demo --help` shows what it takes
demo --nproc 0                          | --nproc must be 1 or more
demo --seed -1                          | seed must not be negative
demo --out set                          | set holds other things than a demo: name another folder with --out
demo --out a.txt                        | cannot make the folder a.txt: File exists: name another one with --out
demo --shards nowhere                   | nowhere: no such data set
demo --overwrite --out set              | set is not the folder of a demo
synth                                   | required: OUT
synth a.txt                             | a.txt: a file, where the folder of a data set is to go
synth set                               | set: already exists and is not empty
synth run --overwrite                   | holds 'config.yaml', which is not of a data set
synth s --takes 0                       | --takes must be 1 or more, not 0
synth s seed=3                          | mser synth does not take 'seed=3'
inspect                                 | required: SET
inspect nowhere                         | nowhere: no such data set
inspect ''                              | '': no such data set
inspect my1.yaml                        | my1.yaml: neither a folder of shards nor a .tar
inspect run                             | run: holds no .tar shard
inspect set/*.tar                       | patterns are not filled in
inspect data.sets=set                   | data.sets=set: no such data set
inspect set set                         | the same shard is named twice
inspect set --split trian               | no sample is left by the filter: split ['trian'] of ['train']
inspect set --json set                  | set: cannot be written (Is a directory): choose another place with --json
inspect set --json nowhere/x.json       | nowhere/x.json: cannot be written (No such file or directory): choose another
inspect set --out a.txt                 | a.txt: cannot be written (File exists): choose another place with --out
inspect s3://x/y                        | this kind of URL needs another package
inspect ftp://nowhere.invalid/y         | ftp://nowhere.invalid/y/dataset.json: no connection
verify                                  | required: SET
verify nowhere                          | nowhere: no such data set
verify my1.yaml                         | my1.yaml: neither a folder of shards nor a .tar
verify run                              | run: holds no .tar shard
verify http://127.0.0.1:1/x             | only a local data set can be verified
sync nowhere                            | nowhere is no run folder: it has no config.yaml
sync set                                | set is no run folder
sync my1.yaml                           | my1.yaml is no run folder
doctor x                                | mser doctor does not take 'x'
doctor --no-ranks --json run            | run cannot be written (Is a directory)
doctor --no-ranks --json nowhere/x      | nowhere/x cannot be written
submit no_such.yaml                     | the file does not exist
submit my1.yaml --nodes 0               | nodes (--nodes) must be 1 or more
submit my1.yaml --tasks-per-node 0      | tasks_per_node (--tasks-per-node) must be 1 or more
submit my1.yaml --time 24h              | '24h' is no wall time: write minutes, HH:MM:SS or D-HH:MM:SS
submit my1.yaml --signal 0              | signal_seconds (--signal) must be 1 or more
submit my1.yaml --dry-run --after job   | 'job' is no SLURM job: give its number
submit my1.yaml --slurm 'mem 64G'       | --slurm 'mem 64G' is no option of sbatch: write --slurm KEY=VALUE
submit my1.yaml --local --after 12      | waiting for a job by its number needs SLURM
submit my1.yaml --local --nodes 2       | use tasks_per_node (--tasks-per-node) for several ranks
submit my1.yaml --local --folder a.txt  | cannot make the folder a.txt: File exists: name another one for the logs with
submit nostage.yaml stage=3             | stage is 3: set `stage: 1`
submit my1.yaml stage=2                 | my1.yaml is a config of stage 1
sweep my1.yaml                          | nothing to sweep: give a key several values
sweep my1.yaml seed                     | 'seed' is not key=value
sweep my1.yaml seed=1, 2                | no space behind a comma
sweep my1.yaml --seed 1,2               | a key is set without dashes, seed=1,2
sweep my1.yaml LR=1,2                   | unknown key LR: did you mean train.lr?
sweep my1.yaml seed=1,x                 | 'seed=x': seed must be of type int
sweep my1.yaml stage=1,2                | stage cannot be swept
sweep my1.yaml seed=1,2 out=a.txt       | cannot make the folder a.txt/sweep: Not a directory: choose another one with
requeue my1.yaml 75                     | argument CODE: invalid int value: 'my1.yaml'
requeue 75                              | required: CONFIG
requeue 75 run                          | did you mean run/config.yaml?
"""
LINES = [tuple(part.strip() for part in line.split("|", 1)) for line in MISTAKES.strip("\n").splitlines()]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


def refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr, with `says`, and exit code 2."""
    code = cli.main(words)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert error.startswith("mser: error: ") and says in error
    assert code == 2


@pytest.mark.parametrize(("words", "says"), LINES, ids=[words for words, _ in LINES])
def test_a_mistake_is_one_line(
    words: str, says: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    if (
        "transformers" in sys.modules
    ):  # imported by another test: the command switches its bars off before it imports it
        from transformers.utils import logging

        logging.disable_progress_bar()
    before = tree(place)
    try:
        refused(shlex.split(words.replace("LONG", LONG)), says, capsys)
    finally:
        distributed.shutdown()
    assert tree(place) == before
    assert not (place / "q").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_config_that_may_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "denied.yaml").touch(mode=0)
    refused(["train", str(tmp_path / "denied.yaml")], "denied.yaml: Permission denied: name another path", capsys)
