"""DeepSpeed behind forward, backward, step, collect and restore; its JSON checked against the run config."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mser_dist import config as cfg
from mser_dist import deepspeed_module, deepspeed_parts
from mser_dist.contrastive import bounds
from mser_dist.errors import UserError
from mser_dist.models.weights import Weights
from mser_dist.ranks.distributed import World
from mser_dist.state import engine_state
from mser_dist.training import average
from mser_dist.training.groups import assign, parameter_groups, rates
from mser_dist.training.supported import check_supported
from mser_dist.training.timing import Timer

_SECTIONS = ("zero_optimization", "bf16", "fp16", "data_types")


def find_json(name: str) -> Path:
    """A DeepSpeed JSON by path, or by its name in ``ds_configs/`` (beside the package, or inside an installed one)."""
    package = Path(__file__).parents[1]
    candidates = [
        Path(name),
        *(f / f"{name.removesuffix('.json')}.json" for f in (package.parent / "ds_configs", package / "ds_configs")),
    ]
    for path in candidates:
        if path.is_file():
            return path
    shipped = sorted({p.stem for f in candidates[1:] for p in f.parent.glob("*.json")})
    raise UserError(f"engine.deepspeed={name}: no such file, and none of the shipped ones: {', '.join(shipped)}")


def resolve_json(config: cfg.Common, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config of a run: its JSON, filled in with what the run config decides.

    Raises `UserError` where the JSON says otherwise than the run config, or holds what is the run config's alone.
    """
    path = find_json(config.engine.deepspeed)
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(plain, dict) or not all(isinstance(plain.get(key, {}), dict) for key in _SECTIONS):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object whose {', '.join(_SECTIONS)} are objects too")
    if int(plain.get("zero_optimization", {}).get("stage", 0)) == 0:
        raise UserError(
            f"{path}: without ZeRO, DeepSpeed steps on gradients that are not finite: set zero_optimization.stage=1, "
            "which does the same with less memory"
        )
    for section, instead in {
        "optimizer": "train.lr, train.betas, …",
        "scheduler": "train.warmup, train.min_lr",
    }.items():
        if section in plain:
            raise UserError(f"{path}: remove the section {section!r}: the run config decides it ({instead})")
    node = int(plain.get("zero_optimization", {}).get("zero_hpz_partition_size", 1))
    if world_size % node:
        raise UserError(
            f"{path}: zero_hpz_partition_size={node} does not divide the {world_size} ranks: set it to the GPUs of a "
            "node, or take zero3_bf16"
        )
    micro, accumulation = cfg.batch_shape(config.train, world_size)
    if config.stage == 1:  # gradient caching: its micro-batches are parts of one backward pass, see `one_reduction`
        micro, accumulation = micro * accumulation, 1
    decided = {
        "train_batch_size": (config.train.global_batch, "train.global_batch"),
        "train_micro_batch_size_per_gpu": (
            micro,
            "train.global_batch / world size" if config.stage == 1 else "train.micro_batch",
        ),
        "gradient_accumulation_steps": (
            accumulation,
            "gradient caching" if config.stage == 1 else "train.global_batch / (train.micro_batch · world size)",
        ),
        "gradient_clipping": (config.train.grad_clip, "train.grad_clip"),
    }
    for key, (value, source) in decided.items():
        said = plain.get(key, "auto")
        if said not in ("auto", value):
            raise UserError(f"{path}: {key}={said} contradicts {source}={value}: remove {key} from the JSON")
        plain[key] = value
    for section, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        enabled = config.engine.dtype == dtype
        said = plain.get(section, {}).get("enabled", "auto")
        if said not in ("auto", enabled):
            raise UserError(
                f"{path}: {section}.enabled={str(said).lower()} contradicts engine.dtype={config.engine.dtype}: "
                f"{f'set engine.dtype={dtype}' if said else 'change engine.dtype'} or remove {section} from the JSON"
            )
        plain[section] = {**plain.get(section, {}), "enabled": enabled}
    if config.engine.dtype == "bfloat16":  # of whose 8 bits a sum over ranks and micro-batches loses what is small
        plain.setdefault("communication_data_type", "fp32")
        plain["data_types"] = {"grad_accum_dtype": "fp32", **plain.get("data_types", {})}
    plain.setdefault("steps_per_print", 10**9)  # our log says more
    try:
        check_supported(plain)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return plain


def schedule(train: cfg.TrainConfig, total: int) -> Any:
    """step → share of the peak learning rate, by transformers' schedules.

    Those count steps that are done, from 0, with a learning rate of 0: here the first step is number 1, so that it does
    something, and so is the last one above the floor.
    """
    from transformers import get_scheduler

    warm, last = max(1, round(train.warmup * total)), total + 1
    decay = max(1, min(round(train.decay * total), last - warm))
    name, more = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": train.min_lr}),
        "linear": ("polynomial", {"lr_end": train.min_lr, "power": 1.0}),
        "constant": ("constant_with_warmup", {}),
        "wsd": (
            "warmup_stable_decay",
            {"num_decay_steps": decay, "min_lr_ratio": train.min_lr, "decay_type": "linear"},
        ),
    }[train.schedule if train.min_lr < 1 else "constant"]
    unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the shares alone are wanted, and for the optimizer of any engine
    library = get_scheduler(name, unit, warm, last, scheduler_specific_kwargs=more)

    def share(step: int) -> float:
        return float(library.lr_lambdas[0](min(step + 1, last)))  # beyond its end the library's cosine rises again

    return share


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every whole floating-point parameter the engine's dtype; buffers such as RoPE's frequencies stay fp32.

    DeepSpeed does so itself, unless a part was partitioned as it loaded: then it takes all parts to be in order.
    """
    for tensor in model.parameters():
        if tensor.is_floating_point() and not deepspeed_parts.is_partitioned(tensor):
            tensor.data = tensor.data.to(dtype)


class Engine:
    """A model under DeepSpeed. `total` is the number of optimizer steps of the whole training."""

    def __init__(self, model: nn.Module, config: cfg.Common, world: World, total: int, device: str) -> None:
        self.timer = Timer(device == "cuda")
        self.json = resolve_json(config, world.world_size)
        zero = self.json.get("zero_optimization", {})
        self.zero_stage = int(zero.get("stage", 0))
        _cast(model, getattr(torch, config.engine.dtype))
        self.assigned = assign(model, config.train.groups)
        self._decay = config.train.ema
        self.reloaded: set[str] = set()  # frozen parameters that every start loads anew: no checkpoint holds them
        groups = parameter_groups(model, config.train, self.assigned)
        betas = (config.train.betas[0], config.train.betas[1])
        optimizer: torch.optim.Optimizer
        if zero.get("offload_optimizer", {}).get("device", "none") != "none":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer = DeepSpeedCPUAdam(groups, lr=config.train.lr, betas=betas, adamw_mode=True)
        else:
            optimizer = torch.optim.AdamW(groups, lr=config.train.lr, betas=betas, fused=device == "cuda")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(config.train, total))
        self._engine, *_ = deepspeed_module.module().initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=self.json, dist_init_required=False
        )
        deepspeed_parts.check_moved(self._engine)
        limits = {name: (low, high) for name, low, high in bounds(model)}
        named = self.module.named_parameters()
        self._bounded = [(parameter, *limits[name]) for name, parameter in named if name in limits]
        parts = [part for group in deepspeed_parts.trained(self._engine) for part in group] if limits else []
        self._bounded_parts = [(part, *limits[part.name]) for part in parts if part.name in limits and part.count]

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def forward(self, batch: dict[str, Any]) -> Any:
        with self.timer.part("forward"):
            return self._engine(batch)

    @contextmanager
    def one_reduction(self) -> Iterator[None]:
        """Around several backward passes that are one step's: gradients add up here, and are reduced once, at the end.

        Takes memory for whole gradients. Where these are added up in a wider dtype than the model's (float32 for
        bfloat16), DeepSpeed does not: ZeRO-1 reduces at the last backward pass alone, which `no_sync` marks, 2 and 3 at
        each, and a rank adds up its part.
        """
        with self._engine.coalesce_grad_reduction() if deepspeed_parts.coalesces(self._engine) else nullcontext():
            try:
                yield
            except BaseException:  # DeepSpeed would now reduce what there is, and wait for ranks that do not come
                deepspeed_parts.drop_gradients(self.module)
                raise

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around the forward and backward pass of a part of a step that is not its last."""
        if deepspeed_parts.coalesces(self._engine):
            yield
            return
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch; DeepSpeed divides by the accumulation steps."""
        with self.timer.part("backward"):
            self._engine.backward(loss)

    def step(self) -> None:
        """Close a micro-batch; at the accumulation boundary, clip, update and move the schedule."""
        before = deepspeed_parts.counters(self._engine)["global_steps"]
        with self.timer.part("step"):
            self._engine.step()
            self._hold_bounds()
            if self._decay and deepspeed_parts.counters(self._engine)["global_steps"] > before and self.step_applied:
                average.update(self._engine, self._decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the average of its weights (`train.ema`) for the block, if it keeps one. Collective."""
        if self._decay:
            average.swap(self._engine)
        yield  # not in a try: after an error on one rank the others would wait for it here
        if self._decay:
            average.swap(self._engine)

    def use_average(self) -> None:
        """The model has the average of its weights from now on, to be exported. Collective."""
        if self._decay:
            average.swap(self._engine)

    @torch.no_grad()
    def _hold_bounds(self) -> None:
        """Clamp bounded parameters, in the fp32 masters and in what the model computes with; each rank its own part."""
        for part, low, high in self._bounded_parts:
            part.view(part.owner).clamp_(low, high)
        for parameter, low, high in self._bounded:
            deepspeed_parts.clamp(parameter, low, high)

    @property
    def grad_norm(self) -> float:
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates of the next step, as `groups.rates` names them."""
        return rates(deepspeed_parts.optimizer(self._engine).param_groups)

    @property
    def step_applied(self) -> bool:
        """Whether the last step changed the weights: it does not where the gradient was not finite on some rank."""
        return bool(self._engine.was_step_applied())

    @property
    def skipped_steps(self) -> int:
        return deepspeed_parts.counters(self._engine)["skipped_steps"]

    def collect(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This rank's slices of the training state and their description, see `engine_state`. Collective."""
        return engine_state.collect(self._engine, self.reloaded)

    def restore(self, folder: Path, fork: bool = False) -> None:
        """Go back to what `collect` gave, from the files of any number of ranks; see `engine_state`. Collective."""
        self.reloaded -= engine_state.restore(self._engine, folder, fork)
        if not self._decay:
            average.drop(self._engine)
        # By this run's schedule: the one that wrote the files may have been shorter.
        schedule = self._engine.lr_scheduler
        groups = deepspeed_parts.optimizer(self._engine).param_groups
        for group, peak, share in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = peak * share(schedule.last_epoch)

    def parts(self) -> list[list[deepspeed_parts.Part]]:
        """What this rank steps of each parameter, by the optimizer's groups."""
        return deepspeed_parts.trained(self._engine)

    def state_bytes(self) -> int:
        """Bytes that this rank's part of a checkpoint takes."""
        return sum(tensor.nbytes for tensor in self.collect()[0].values())

    def weights(self) -> Weights:
        """Parameters and persistent buffers, each given whole where there is a place for it. Collective."""
        parameters = dict(self.module.named_parameters())
        persistent = self.module.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.module.named_buffers() if name in persistent}
        shapes = {name: deepspeed_parts.shape(p) for name, p in parameters.items()}
        facts = {
            name: torch.empty(shape, dtype=parameters[name].dtype, device="meta") for name, shape in shapes.items()
        }
        facts |= {name: torch.empty_like(buffer, device="meta") for name, buffer in buffers.items()}

        def get(name: str, place: Tensor | None) -> Tensor | None:
            if name in parameters and deepspeed_parts.is_partitioned(parameters[name]):
                deepspeed_parts.gather(parameters[name], place)
            elif place is not None:
                place.copy_((parameters[name] if name in parameters else buffers[name]).detach())
            return place

        return Weights(facts, get)
