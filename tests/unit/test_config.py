import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mser_dist import config as cfg
from mser_dist.config import file as config_file
from mser_dist.config.fields import key_table
from mser_dist.config.file import load_any, load_evaluation, load_training
from mser_dist.errors import UserError

PRESETS = sorted(path.stem for path in config_file.PRESETS.glob("*.yaml"))
STAGE1 = "stage: 1\ndata: {sets: [shards]}\n"


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def stage1(tmp_path: Path, *words: str, more: str = "") -> cfg.Stage1 | cfg.Stage2:
    return load_training(write(tmp_path / "run.yaml", STAGE1 + more), list(words))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_read_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_any(name, [])
    saved = write(tmp_path / "resolved.yaml", config_file.to_yaml(config))
    again = load_any(saved, [])
    assert type(again) is type(config)
    assert again == config
    (first, *_) = (config_file.PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert first.startswith("# "), "`mser config` lists a preset by its first line"


def test_the_presets_of_the_design_are_there() -> None:
    assert {"demo_stage1", "demo_stage2", "demo_eval"} <= set(PRESETS)
    assert {"whisper-large-v3_llama3-8b_stage1", "whisper-large-v3_llama3-8b_stage2"} <= set(PRESETS)


def test_defaults_then_file_then_command_line(tmp_path: Path) -> None:
    config = stage1(tmp_path, "train.lr=3e-4", "qformer.heads=2", more="train: {lr: 0.01, epochs: 3}\n")
    assert isinstance(config, cfg.Stage1)
    assert (config.train.lr, config.train.epochs, config.train.global_batch) == (
        3e-4,
        3.0,
        cfg.TrainConfig().global_batch,
    )
    assert (config.qformer.heads, config.qformer.width) == (2, cfg.QFormerConfig().width)


def test_an_override_reaches_into_sections_and_sets_them_whole(tmp_path: Path) -> None:
    config = load_training("demo_stage1", ["encoder.arch.d_model=64", "data.sets=a,b", "data.languages=[de, fr]"])
    assert isinstance(config, cfg.Stage1)
    assert config.encoder.arch["d_model"] == 64
    assert config.encoder.arch["encoder_layers"] == 3  # from the preset
    assert (config.data.sets, config.data.languages) == (["a", "b"], ["de", "fr"])
    lora = load_training("whisper-small_smollm2_stage2", ["llm.lora.rank=4"])
    assert isinstance(lora, cfg.Stage2)
    assert lora.llm.lora == cfg.LoraConfig(rank=4)
    plain = load_training("whisper-small_smollm2_stage2", [])
    assert load_training("whisper-small_smollm2_stage2", ["llm.lora={rank: 4}", "llm.lora=null"]) == plain


@pytest.mark.parametrize(
    ("word", "section", "key", "value"),
    [
        ("train.lr=1e-4", "train", "lr", 1e-4),  # YAML 1.1 reads a string here: no dot
        ("train.lr='1e-4'", "train", "lr", 1e-4),
        ("train.epochs=2", "train", "epochs", 2.0),
        ("train.global_batch=1e3", "train", "global_batch", 1000),
        ("train.global_batch=64.0", "train", "global_batch", 64),
        ("train.betas=0.9,0.95", "train", "betas", [0.9, 0.95]),
        ("train.micro_batch=null", "train", "micro_batch", None),
        ("data.val_split=null", "data", "val_split", None),
        ("data.split=2024", "data", "split", "2024"),
        ("data.shuffle_labels=yes", "data", "shuffle_labels", True),
    ],
)
def test_values_are_cast_to_their_types(tmp_path: Path, word: str, section: str, key: str, value: Any) -> None:
    found = getattr(getattr(stage1(tmp_path, word), section), key)
    assert (found, type(found)) == (value, type(value))


def test_of_two_words_for_one_key_the_last_one_counts(tmp_path: Path) -> None:
    assert stage1(tmp_path, "train.lr=1", "train={lr: 2}", "train.lr=3", "seed=1").train.lr == 3.0


def test_large_seeds_keep_every_digit(tmp_path: Path) -> None:
    assert stage1(tmp_path, f"seed={2**53 + 1}").seed == 2**53 + 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train.learning_rate=1"], r"unknown key train\.learning_rate: did you mean train\.lr\?"),
        (["train.no=1"], r"unknown key train\.no: known here: .*\blr\b"),
        (["trian.lr=1"], r"unknown key trian: did you mean train\?"),
        (["lr=3e-4"], r"unknown key lr: did you mean train\.lr\?"),
        (["lrr=3e-4"], r"unknown key lrr: did you mean train\.lr\?"),
        (["width=8"], r"unknown key width: did you mean qformer\.width or contrastive\.width\?"),
        (["train.dtype=float16"], r"unknown key train\.dtype: did you mean engine\.dtype\?"),
        (["data.augment.sped=0.1"], r"unknown key data\.augment\.sped: did you mean data\.augment\.speed\?"),
        (["train.globl_batch=1"], r"unknown key train\.globl_batch: did you mean train\.global_batch\?"),
        (["qformer.with=1"], r"did you mean qformer\.width\?"),
        (["llm={}"], "llm is a key of stage 2, not of stage 1: leave it out"),
        (["train.lr=fast"], r"train\.lr must be of type float, not 'fast'"),
        (["train.lr=.nan"], r"train\.lr must be of type float, not nan"),
        (["train.lr=.inf"], "train.lr must be of type float"),
        (["train.global_batch=6.5"], "train.global_batch must be of type int, not 6.5"),
        (["train.groups=[{match: a, lrr: 1}]"], r"unknown key train\.groups\.0\.lrr: did you mean lr\?"),
        (["train.groups=[{match: a, lr: 0}]"], r"train\.groups\.0\.lr must be positive, not 0"),
        (["train.groups=[{match: '('}]"], r"train\.groups\.0\.match must be a regular expression, not '\('"),
        (["train.steps=true"], "train.steps must be of type int, not True"),
        (["train.lr="], "train.lr must be of type float, not null"),
        (["encoder.freeze=1"], "encoder.freeze must be of type bool, not 1"),
        (["data.sets={a: 1}"], "data.sets must be a list"),
        (["data.languages=[no]"], "data.languages must be of type str, not False"),  # YAML's Norway problem
        (["train=3"], "train is a section of keys, not 3"),
        (["train.lr.x=3"], "train.lr must be of type float"),
        (["train={1: 2}"], r"unknown key train\.1: known here: .*\blr\b"),
        (["encoder.arch={no: 1}"], "encoder.arch has the key False, which YAML reads so: put it in quotes"),
        (["train.lr"], "'train.lr' is not key=value"),
        (["=3"], "'=3' is not key=value"),
        (["train.lr=[1"], "'train.lr=\\[1': the value is not valid YAML"),
        (["encoder.arch={d_model: 8, d_model: 9}"], r"d_model: 9}': key \"d_model\" is given twice"),
        (["stage=3"], "stage is 3: set `stage: 1`"),
        (["data.sets=[]"], "data.sets is empty"),
        (["data.labels=[sad]"], "two or more different labels"),
        (["data.labels=[sad, sad]"], "two or more different labels"),
        (["data.workers=-1"], "data.workers must not be negative"),
        (["data.max_seconds=0"], "data.max_seconds must be positive"),
        (["seed=-1"], "seed must not be negative"),
        (["tracking.uri=http://me:secret@host"], "tracking.uri holds a password"),
        (["tracking.uri=postgresql://db/x?user=me&password=secret"], "tracking.uri holds a password"),
        (["train.global_batch=0"], "train.global_batch must be positive, not 0"),
        (["train.steps=0"], "train.steps must be positive, not 0"),
        (["train.schedule=wsd", "train.warmup=0.9"], "train.warmup=0.9 and train.decay=0.2 are more than all steps"),
        (["train.schedule=cos"], "train.schedule is .cos.: use one of cosine, linear, constant, wsd"),
        (["train.epochs=0"], "train.epochs must be positive"),
        (["train.save_every=-1"], "train.save_every must not be negative"),
        (["train.grad_clip=-1"], "train.grad_clip must not be negative"),
        (["train.warmup=5"], "train.warmup is a share between 0 and 1, not 5"),
        (["train.min_lr=-1"], "train.min_lr is a share between 0 and 1, not -1"),
        (["data.augment.speed=0.6"], r"data\.augment\.speed is between 0 and 0\.5, not 0\.6"),
        (["data.augment.time_width=0"], "data.augment.time_width is a share above 0 and at most 1, not 0"),
        (["data.augment.noise_snr_db=[20, 5]"], r"data\.augment\.noise_snr_db is \[lowest, highest\] in dB, not \[20"),
        (["data.weights=[1, -1]"], "data.weights must be positive, not -1"),
        (["train.micro_batch=0"], "train.micro_batch must be positive, not 0"),
        (["train.lr=-1", "train.lrr=1"], "unknown key train.lrr"),  # the one that may explain the other
        (["train.betas=[0.9]"], "train.betas must be two numbers"),
        (["train.betas=[0.9, 1.0]"], "train.betas must be two numbers"),
        (["engine.dtype=fp16"], "engine.dtype is 'fp16': use one of float32, bfloat16, float16"),
        (["engine.attention=flash"], "engine.attention is 'flash': use one of auto, flash_attention_2"),
        (["contrastive.temperature=0"], "contrastive.temperature must be positive"),
        (["contrastive.beta=-1"], "contrastive.beta must not be negative"),
        (["contrastive.loss=clip"], "contrastive.loss is 'clip': use one of supcon, sum, masked, siglip, infonce"),
        (["contrastive.gather=tree"], "contrastive.gather is 'tree': use one of all_gather, ring"),
        (["contrastive.alpha_schedule=[[0.5, 1], [0.1, 0]]"], "shares that rise from 0 to 1"),
        (["contrastive.alpha_schedule=[[0.5]]"], r"a list of \[share of the steps, factor\]"),
        (["contrastive.beta_schedule=[[0, -1]]"], "beta_schedule has factors of 0 or more, not"),
        (["encoder.pretrained=x", "encoder.arch={d_model: 8}"], "keep one of them"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        stage1(tmp_path, *words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stage1="], "stage1 must be of type str"),
        (["stage1=''"], "stage1 is not set: name the run folder"),
        (["llm.pretrained=x"], "llm.pretrained and llm.arch are both set"),
        (["llm.lora.rank=8"], "llm.lora needs llm.pretrained"),
        (["llm.freeze=true", "llm.lora.rank=8", "llm.pretrained=x", "llm.arch={}"], "drop llm.freeze"),
        (["llm.lora.rnk=8"], r"did you mean llm\.lora\.rank\?"),
    ],
)
def test_mistakes_of_stage_2_are_named(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_training("demo_stage2", words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.sets=[]"], "data.sets is empty"),
        (["stage1=null", "stage2=null"], "stage1 and stage2 are both unset"),
        (["dtype=half"], "dtype is 'half': use one of"),
        (["attention=fast"], "attention is 'fast': use one of"),
        (["batch=0"], "batch must be positive"),
        (["data.labels=[sad]"], "two or more different labels"),
        (["data.shuffle_labels=true"], "unknown key data.shuffle_labels"),
    ],
)
def test_mistakes_of_evaluation_are_named(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_evaluation("demo_eval", words)


def test_a_config_goes_to_its_own_command() -> None:
    with pytest.raises(UserError, match="give it to `mser train`"):
        load_evaluation("demo_stage1", [])
    with pytest.raises(UserError, match="this is a config for mser eval: give it to `mser eval`"):
        load_training("demo_eval", [])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"stage: 1\ntrain: {lr: 1\ndata:\n", r"run\.yaml:\d: not valid YAML"),
        (b"stage: 1\n\ttrain: 1\n", r"run\.yaml:2: not valid YAML"),
        (
            b"stage: 1\ntrain: {lr: 1}\nseed: 2\ntrain: {steps: 1}\n",
            r'run\.yaml:4: key "train" is given twice \(first in line 2\)$',
        ),
        (b"stage: 1\ntrain:\n  lr: 1\n  lr: 2\n", r'run\.yaml:4: key "lr" is given twice \(first in line 3\)$'),
        (b"stage: 1\ntrain: {lr: 1, lr: 2}\n", r'run\.yaml:2: key "lr" is given twice \(first in line 2\)$'),
        (b"stage: 1\ndata: {keep: {a: 1, b: {c: 1, c: 2}}}\n", r'run\.yaml:2: key "c" is given twice'),
        (b"stage: 1\ntrain:\n  <<: {lr: 1}\n  <<: {lr: 2}\n", r'run\.yaml:4: key "<<" is given twice'),
        (b"stage: 1\ntrain.lr: 1\n", r"run\.yaml: unknown key train\.lr: in a file, write train: \{lr: "),
        (b"- 1\n", "a config is a mapping .*, not '- 1'"),
        (b"", "the file is empty"),
        (b"\xff\xfe\x00", "not a YAML text file"),
        (b"stage: 1\ndata: {sets: !!python/object/apply:os.getcwd []}\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_training(str(path), [])
    assert "\n" not in str(caught.value)


def test_a_missing_config_names_the_nearest_preset() -> None:
    with pytest.raises(UserError, match="did you mean the preset demo_stage1"):
        load_training("demo_stag1", [])
    with pytest.raises(UserError, match=r"one of the presets: .*demo_eval"):
        load_training("zzz", [])


def test_a_file_that_does_not_exist_is_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "stage.yaml").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    for name, says in {
        "my.yaml": "'my.yaml': the file does not exist$",
        "runs/demo_stage1": "'runs/demo_stage1': the file does not exist, did you mean the preset demo_stage1\\?$",
        f"{tmp_path}/stagee.yml": rf": the file does not exist, did you mean {tmp_path}/stage\.yaml\?$",
        f"{tmp_path}/run": rf": it is the folder of a run, did you mean {tmp_path}/run/config\.yaml\?$",
        f"{tmp_path}": ": it is a folder: give a YAML file or a preset",
    }.items():
        with pytest.raises(UserError, match=says):
            load_training(name, [])


def test_a_key_beside_a_merge_key_replaces_what_it_brings(tmp_path: Path) -> None:
    # c is built before inner, whose keys are then filled in already: 8 stands in it twice, and nobody wrote it so
    arch = "encoder: {arch: {outer: {inner: &a {<<: {x: 1, y: 2}, x: 8}}, c: {<<: *a, y: 3}}}\n"
    config = stage1(tmp_path, more=arch)
    assert isinstance(config, cfg.Stage1)
    assert config.encoder.arch == {"outer": {"inner": {"x": 8, "y": 2}}, "c": {"x": 8, "y": 3}}


def test_flatten_gives_dotted_strings() -> None:
    config = load_training("demo_stage1", [])
    flat = config_file.flatten(config)
    assert flat["train.global_batch"] == "64"
    assert flat["encoder.arch.d_model"] == "128"
    assert flat["data.languages"] == "[]"
    assert all(isinstance(value, str) for value in flat.values())
    assert flat == config_file.flatten(config_file.yaml.safe_load(config_file.to_yaml(config)))


@pytest.mark.parametrize("cls", [cfg.Stage1, cfg.Stage2, cfg.Evaluation])
def test_every_key_is_explained(cls: type) -> None:
    rows = {key: help for key, _, _, help in key_table(cls)}
    assert all(rows.values()), [key for key, help in rows.items() if not help]
    assert "data.max_seconds" in rows
    if cls is cfg.Stage2:
        assert {"llm.lora", "llm.lora.rank"} <= rows.keys()


# What may be below 0; all else that counts or measures may not.
ANY_SIGN = {"contrastive.bias"}
# What may not be above 1.
SHARES = {
    *("data.augment.probability", "data.augment.speed", "data.augment.time_width", "train.warmup", "train.min_lr"),
    *("qformer.dropout", "llm.lora.dropout", "train.betas", "contrastive.alpha_schedule", "contrastive.beta_schedule"),
}


@pytest.mark.parametrize(
    ("preset", "cls"), [("demo_stage1", cfg.Stage1), ("demo_stage2", cfg.Stage2), ("demo_eval", cfg.Evaluation)]
)
def test_every_number_is_held_to_its_type_and_its_bounds(preset: str, cls: type) -> None:
    numbers = {key: kind for key, kind, _, _ in key_table(cls) if "int" in kind or "float" in kind.split("|")[0]}
    numbers = {key: kind for key, kind in numbers.items() if not kind.startswith("float32")}
    assert len(numbers) >= (5 if cls is cfg.Evaluation else 30)
    for key, kind in numbers.items():
        wrong = ["fast", "true", ".nan", ".inf", "-.inf", "{a: 1}", "2020-01-01"]
        wrong += ["1.5"] if "int" in kind else []
        wrong += ["-1"] if key not in ANY_SIGN else []
        wrong += ["2"] if key in SHARES else []
        wrong += ["null"] if "None" not in kind else []
        depth = kind.count("list")
        for value in wrong if key != "stage" else ["-1", "1.5", "fast"]:
            word = f"{key}={'[' * depth}{value}{', 0.5]' if depth > 1 else ''}{']' * (depth > 0)}"
            with pytest.raises(UserError) as caught:
                load_any(preset, [word])
            assert key in str(caught.value) and "\n" not in str(caught.value), f"{word}: {caught.value}"


def test_a_config_made_in_python_is_held_to_the_same() -> None:
    config = cfg.Stage1(data=cfg.TrainingDataConfig(sets=["shards"]))
    config.train.lr = "1e-4"  # type: ignore[assignment]
    config.train.betas = (0.9, 0.95)  # type: ignore[assignment]
    config.check()
    assert (config.train.lr, config.train.betas) == (1e-4, [0.9, 0.95])
    wrong: list[tuple[Any, str, Any, str]] = [
        (config.train, "lr", -1.0, r"train\.lr must be positive, not -1"),
        (config.train, "steps", True, r"train\.steps must be of type int, not True"),
        (config.engine, "dtype", "half", r"engine\.dtype is 'half': use one of float32"),
        (config, "data", cfg.DataConfig(sets=["shards"]), "^data must be a TrainingDataConfig, not a DataConfig$"),
        (config, "train", {"lr": 1.0, "lrr": 1}, r"unknown key train\.lrr"),
    ]
    for section, name, value, says in wrong:
        broken = copy.deepcopy(config)
        part = broken if section is config else getattr(broken, type(section).__name__.removesuffix("Config").lower())
        setattr(part, name, value)
        with pytest.raises(UserError, match=says):
            broken.check()
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_command_line_says_its_help_without_pydantic() -> None:
    code = "import sys, mser_dist.cli.main as m; m._parser().format_help(); sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(batch=st.integers(1, 4096), world=st.integers(1, 64), micro=st.one_of(st.none(), st.integers(-2, 300)))
def test_batch_shape_multiplies_out_or_is_refused(batch: int, world: int, micro: int | None) -> None:
    train = cfg.TrainConfig(global_batch=batch, micro_batch=micro)
    fits = batch % world == 0 and (micro is None or (micro > 0 and batch // world % min(micro, batch // world) == 0))
    if fits:
        per_pass, accumulation = cfg.batch_shape(train, world)
        assert per_pass * accumulation * world == batch
        assert per_pass == min(micro or batch, batch // world)
    else:
        with pytest.raises(UserError, match=r"train\.(global|micro)_batch=.* does not divide"):
            cfg.batch_shape(train, world)


def test_batch_shape_proposes_what_fits() -> None:
    with pytest.raises(UserError, match=r"does not divide by the world size 3: set train\.global_batch=63 or"):
        cfg.batch_shape(cfg.TrainConfig(global_batch=64), 3)
    with pytest.raises(UserError, match="choose a divisor of 32"):
        cfg.batch_shape(cfg.TrainConfig(global_batch=64, micro_batch=5), 2)
