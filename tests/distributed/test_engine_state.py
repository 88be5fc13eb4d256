"""A DeepSpeed engine's state comes back bit for bit, on another number of ranks, and under another ZeRO stage."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mser_dist import deepspeed_parts
from mser_dist.errors import UserError
from mser_dist.files import write_json
from mser_dist.ranks import distributed
from mser_dist.state import engine_state, manifest
from mser_dist.training.supported import check_supported
from tests.distributed.spawn import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
STEPS, MICRO, WIDTH = 3, 4, 6
BF16 = {"bf16": {"enabled": True}}
SUMS = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}  # as a run has them with bf16
FP16 = {"fp16": {"enabled": True, "loss_scale_window": 2, "initial_scale_power": 12}}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, **more}}


PARTITIONED = zero(3, stage3_param_persistence_threshold=0)  # else small weights stay gathered between steps
CASES: dict[str, dict[str, Any]] = {
    "0": zero(0),
    "0 bf16": zero(0) | BF16,
    "0 fp16": zero(0) | FP16,
    "1": zero(1),
    "1 bf16": zero(1) | BF16,
    "1 bf16, fp32 gradients": zero(1) | BF16 | SUMS,
    "2": zero(2),
    "2 bf16": zero(2) | BF16 | SUMS,
    "2 fp16": zero(2) | FP16,
    "2 aligned": zero(2, parameter_alignment=True),
    "2 offload": zero(2, **OFFLOAD) | BF16 | SUMS | {"zero_force_ds_cpu_optimizer": False},
    "3": zero(3),
    "3 partitioned": PARTITIONED,
    "3 bf16": zero(3) | BF16,
    "3 bf16, partitioned": PARTITIONED | BF16 | SUMS,
    "3 fp16": zero(3) | FP16,
    "3 sub-groups": zero(3, sub_group_size=20),
    "3 secondary": zero(3, stage3_param_persistence_threshold=0, zero_hpz_partition_size=2) | BF16,
    "3 offload": zero(3, offload_param={"device": "cpu", "pin_memory": False}, **OFFLOAD)
    | BF16
    | SUMS
    | {"zero_force_ds_cpu_optimizer": False},
}


class Model(nn.Module):
    """Every kind of parameter and buffer that a checkpoint has to hold."""

    seen: Tensor
    grown: Tensor

    def __init__(self, width: int = WIDTH, extra: bool = False, seed: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Linear(5, width)  # frozen, below
        self.norm = nn.BatchNorm1d(width, affine=False)  # statistics differ by rank
        self.first, self.tied = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.tied.weight = self.first.weight
        self.one = nn.Linear(width, 1)  # its bias has fewer elements than there are ranks
        self.scale = nn.Parameter(torch.tensor([0.5]))  # of no dimension, DeepSpeed 0.19.8 cannot broadcast it
        self.extra = nn.Linear(2, 3) if extra else None
        self.register_buffer("mask", torch.ones(3, 3).tril().bool(), persistent=False)
        self.register_buffer("expanded", torch.arange(4).expand(2, 4), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("grown", torch.zeros(1), persistent=False)
        self.backbone.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.grown = torch.cat([self.grown, x.float().sum().view(1)])
        x = self.norm(self.backbone(x).float()).to(x.dtype)
        x = self.tied(torch.tanh(self.first(x)))
        return self.one(x).float().mean() * self.scale.float().exp().squeeze()


def make(settings: dict[str, Any], model: Model | None = None) -> Any:
    """A DeepSpeed engine over two parameter groups that differ in all that a group can say."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed wants a CPU's own instructions for float16, for speed; torch computes with it on any.
    get_accelerator().is_fp16_supported = lambda: True
    model = model or Model()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for p in trained.values() if p.dim() > 1]
    groups = [
        {"params": matrices, "lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.98)},
        {"params": [p for p in trained.values() if p.dim() <= 1], "lr": 3e-2, "weight_decay": 0.0, "eps": 1e-6},
    ]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 3))
    ranks = torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 2 * MICRO * ranks,
        "gradient_clipping": 0.1,
        "steps_per_print": 10**9,
        **settings,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, dist_init_required=False
    )
    return engine


def train(engine: Any, steps: range) -> None:
    for step in steps:
        for micro in range(2):
            generator = torch.Generator().manual_seed(100 * step + 10 * micro + torch.distributed.get_rank())
            x = torch.randn(MICRO, 5, generator=generator).to(engine.module.one.weight.dtype)
            engine.backward(engine(x))
            engine.step()


def save(engine: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors, description = engine_state.collect(engine)
    cpu = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    engine_state.write(folder / f"rank-{torch.distributed.get_rank():05d}.safetensors", cpu, description)
    if layouts := distributed.store().to_main(manifest.layout(description)):
        write_json(folder / manifest.FILE, manifest.combine(description, layouts))
    torch.distributed.barrier()  # the other ranks' files are read next


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank-*.safetensors"))


def whole(folder: Path) -> dict[str, Any]:
    """All of a checkpoint put together: full tensors by name (buffers are rank 0's), and the small state."""
    found: dict[str, Any] = {}
    for path in files(folder):
        with safe_open(path, "pt") as file:
            description = json.loads(file.metadata()["mser"])
        for key, tensor in load_file(path).items():
            kind, name = key.split("/")
            if kind == "buffer" and description["rank"] == 0:
                found[key] = tensor
            elif kind != "buffer":
                entry = description["parameters"][name]
                full = found.setdefault(key, torch.full(entry["shape"], torch.nan, dtype=tensor.dtype).view(-1))
                full[entry["start"] : entry["start"] + entry["count"]] = tensor
                found[f"step/{name}"] = entry["step"]
        found |= {key: description[key] for key in ("groups", "scheduler", "loss_scaler", "counters")}
    return found


def differing(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """The keys under which two states are not equal, bit for bit."""
    return [
        key
        for key in sorted(one.keys() | two.keys())
        if not (
            torch.equal(one[key], two[key])
            if isinstance(one.get(key), Tensor) and isinstance(two.get(key), Tensor)
            else key in one and key in two and one[key] == two[key]
        )
    ]


def now(engine: Any) -> dict[str, Any]:
    """All that `collect` gives on this rank, every buffer, and the weights that the model computes with, whole."""
    from deepspeed import zero

    tensors, description = engine_state.collect(engine)
    state: dict[str, Any] = {name: tensor.clone() for name, tensor in tensors.items()}
    state |= {f"buffer {name}": buffer.clone() for name, buffer in engine.module.named_buffers()}
    for name, p in engine.module.named_parameters():
        with zero.GatheredParameters([p], enabled=engine.zero_optimization_stage() == 3):
            state[f"weight {name}"] = p.detach().clone()
    return state | json.loads(json.dumps(description)) | {"lr": engine.get_lr()}


def resume(settings: dict[str, Any], folder: Path, steps: int) -> dict[str, list[str]]:
    """Twice `steps` steps, against `steps` steps, a checkpoint, and `steps` more in a new engine: what differs."""
    straight = make(settings)
    names = deepspeed_parts.moved(straight)
    train(straight, range(steps))
    save(straight, folder)
    half = now(straight)
    train(straight, range(steps, 2 * steps + 1))
    resumed = make(settings, Model(seed=6))  # all that is equal afterwards was in the checkpoint
    found = {"fresh": differing(half, now(resumed)), "moved": differing(half, now(straight))}
    engine_state.restore(resumed, folder)
    found["restored"] = differing(half, now(resumed))
    train(resumed, range(steps, 2 * steps + 1))
    found |= {"names": names + deepspeed_parts.moved(straight), "holders": list(deepspeed_parts.holders(straight))}
    return found | {"continued": differing(now(straight), now(resumed))}


def convert(source: Path, settings: dict[str, Any], target: Path) -> None:
    """Restore a checkpoint under other settings or in another number of processes, write it again, and train on."""
    engine = make(settings, Model(seed=6))
    engine_state.restore(engine, source)
    save(engine, target)
    train(engine, range(STEPS, STEPS + 1))
    for name, tensor in engine_state.collect(engine)[0].items():
        assert tensor.isfinite().all(), name


def refusals(folder: Path) -> dict[str, str]:
    """What `restore` says to a checkpoint that does not fit."""
    thawed = Model()
    thawed.backbone.requires_grad_(True)
    save(make(zero(2), Model(extra=True)), folder / "extra")
    half = folder / "half"
    if torch.distributed.get_rank() == 0:
        half.mkdir()
        shutil.copy(files(folder / "2")[0], half)
    attempts = {
        "wide": (Model(width=7), folder / "2"),
        "more": (Model(extra=True), folder / "2"),
        "fewer": (Model(), folder / "extra"),
        "thawed": (thawed, folder / "2"),
        "half": (Model(), half),
    }
    said = {}
    for name, (model, found) in attempts.items():
        engine = make(zero(2), model)
        before = now(engine)
        try:
            engine_state.restore(engine, found)
        except UserError as error:
            said[name] = str(error)
        assert not differing(before, now(engine)), "a refused checkpoint changes nothing"
    engine = make(zero(3))
    del engine.optimizer.sub_group_to_group_id  # as a new version of DeepSpeed might
    try:
        deepspeed_parts.check_moved(engine)
    except UserError as error:
        said["moved"] = str(error)
    return said


# Written under the first, read under the second, another stage, dtype or both.
CROSSED = [("2", "3"), ("3 bf16", "2 bf16"), ("0", "3 partitioned"), ("3 sub-groups", "0"), ("1 bf16", "3 bf16")]
CROSSED += [("1 bf16, fp32 gradients", "0 bf16"), ("2 fp16", "3 fp16"), ("3 bf16", "3 bf16"), ("2 bf16", "2")]

START = ("0", "2 bf16", "3")  # saved before the first step, too


def on_two_ranks(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: resume(settings, Path(folder) / name, STEPS) for name, settings in CASES.items()}
    found |= {f"{name} at step 0": resume(CASES[name], Path(folder) / "start" / name, 0) for name in START}
    for source, target in CROSSED:
        convert(Path(folder) / source, CASES[target], Path(folder) / "two" / f"{source} to {target}")
    convert(Path(folder) / "start/2 bf16", CASES["0 bf16"], Path(folder) / "two/start")
    return found | {"refusals": refusals(Path(folder))}


def on_one_rank(rank: int, folder: str) -> None:
    for source, target in CROSSED:
        convert(Path(folder) / source, CASES[target], Path(folder) / "one" / f"{source} to {target}")


def back_on_two_ranks(rank: int, folder: str) -> None:
    for source, target in CROSSED:
        name = f"{source} to {target}"
        convert(Path(folder) / "one" / name, CASES[source], Path(folder) / "back" / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine_state")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run(on_two_ranks, 2, str(folder))
    return found


@pytest.mark.parametrize("case", [*CASES, *(f"{name} at step 0" for name in START)])
def test_training_continues_bit_for_bit(two: list[dict[str, Any]], case: str) -> None:
    for rank in two:
        found = rank[case]
        assert found["restored"] == [] and found["continued"] == []
        assert any(key.startswith("master/") for key in found["moved"]), "and there was something to continue"
        if "step 0" not in case:
            differed = {"counters", "lr", "weight scale", "weight backbone.bias"}
            differed |= {"buffer norm.running_mean", "buffer seen"}
            assert differed <= set(found["fresh"])


def test_deepspeed_has_every_inner_name_that_is_used(two: list[dict[str, Any]]) -> None:
    for case in CASES:
        assert two[0][case]["names"] == [], case
    seen = {holder for case in CASES for holder in two[0][case]["holders"]}
    assert seen == deepspeed_parts.INNER.keys(), "an engine of each kind was looked at"
    assert "the wrapper of stage 3" in (said := two[0]["refusals"]["moved"]), said
    assert "has no sub_group_to_group_id any more" in said and "constraints.txt" in said and "\n" not in said, said


def test_another_stage_and_another_number_of_ranks_take_the_same_state(folder: Path, two: list[Any]) -> None:
    """Two ranks under one stage → two under another; → one; and from there back to two under the first."""
    run(on_one_rank, 1, str(folder))
    run(back_on_two_ranks, 2, str(folder))
    for source, target in CROSSED:
        written = whole(folder / source)
        for step in ("two", "one", "back"):
            path = folder / step / f"{source} to {target}"
            assert len(files(path)) == (1 if step == "one" else 2)
            assert differing(written, whole(path)) == [], path
    # Stage 0's wrapper takes a step as it is made, and so has moments where the saved run had none.
    assert differing(whole(folder / "start/2 bf16"), whole(folder / "two/start")) == []


def test_the_manifest_says_what_the_files_say(folder: Path, two: list[Any]) -> None:
    """A checkpoint that has none, as earlier versions wrote them, is read by the files themselves."""
    for case, settings in CASES.items():
        written = json.loads((folder / case / manifest.FILE).read_text())
        assert written == json.loads(json.dumps(manifest.by_files(files(folder / case))))
        listed = {name for name, entry in written["parameters"].items() if "pieces" in entry}
        if settings["zero_optimization"]["stage"] in (0, 3):
            assert not listed, f"{case}: all is cut evenly"
        for rank, path in enumerate(files(folder / case)):
            for name, entry in manifest.describe(path)["parameters"].items():
                held = [piece for piece in manifest.pieces(written, name) if piece[2] == rank and piece[1]]
                assert held == ([(entry["start"], entry["count"], rank)] if entry["count"] else []), (case, name)


def test_nothing_large_is_written_twice(folder: Path, two: list[Any]) -> None:
    for case, settings in CASES.items():
        ranks = [load_file(path) for path in files(folder / case)]
        total = sum(rank["frozen/backbone.weight"].numel() for rank in ranks)
        assert total == 5 * WIDTH, f"{case}: whole frozen weights are written in equal shares"
        assert {"buffer/mask", "buffer/expanded", "buffer/norm.running_mean"} <= ranks[0].keys()
        assert "buffer/norm.running_mean" in ranks[1], "statistics that differ by rank are written by each"
        assert "buffer/mask" not in ranks[1] and "buffer/expanded" not in ranks[1]
        assert sum(rank["master/first.weight"].numel() for rank in ranks if "master/first.weight" in rank) == WIDTH**2
        if settings["zero_optimization"]["stage"] == 3:
            assert all(rank["master/first.weight"].numel() == WIDTH**2 / 2 for rank in ranks)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(two: list[dict[str, Any]]) -> None:
    said = two[0]["refusals"]
    assert said == two[1]["refusals"], "every rank says the same, or the others would wait"
    for name, words in {
        "wide": ["backbone.bias has the shape [6] there and [7] in the model", "more)", "out="],
        "more": ["no parameter extra.bias", "[3]", "(and 1 more)"],
        "fewer": ["extra.bias of shape [3] is not in the model"],
        "thawed": ["backbone.bias is frozen there and trained in parameter group 1 in the model"],
        "half": ["written by 2 ranks and has the files of 1"],
    }.items():
        assert all(word in said[name] for word in words) and "\n" not in said[name], said[name]


def test_settings_whose_state_would_be_lost_are_refused() -> None:
    for settings in CASES.values():
        check_supported(settings)
    nvme = {"device": "nvme", "nvme_path": "/nvme"}
    for said, settings in {
        "offload_optimizer.device=nvme": zero(3, offload_optimizer=nvme),
        "offload_param.device=nvme": zero(3, offload_param=nvme),
        "ratio=0.5": zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        "round_robin_gradients=True": zero(2, round_robin_gradients=True),
        "bf16_optimizer_states=True": {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
    }.items():
        with pytest.raises(UserError, match=said.replace(".", r"\.")):
            check_supported(settings)
