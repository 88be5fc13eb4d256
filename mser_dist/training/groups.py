"""Parameter groups: which parameters train, and with which learning rate and weight decay.

`train.groups` matches the names of parameters; all that no pattern matches takes `train`'s own settings. Frozen before
DeepSpeed is built, a parameter has neither gradient nor optimizer state.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from torch import nn

from mser_dist import config as cfg
from mser_dist import deepspeed_parts
from mser_dist.errors import UserError
from mser_dist.tables import Table

_REST = "(all others)"


def assign(model: nn.Module, groups: list[cfg.GroupConfig]) -> dict[str, cfg.GroupConfig]:
    """The group of each parameter that a pattern matches, by `re.search`; those to be frozen are.

    Patterns with the same settings may overlap. Raises `UserError` for a pattern that matches nothing, for a parameter
    that is matched by two that disagree, and where nothing would be trained.
    """
    names = [name for name, _ in model.named_parameters()]
    found: dict[str, cfg.GroupConfig] = {}
    for group in groups:
        matched = [name for name in names if re.search(group.match, name)]
        if not matched:
            raise UserError(f"train.groups: {group.match!r} matches no parameter: {_near(group.match, names)}")
        for name in matched:
            other = found.setdefault(name, group)
            if _settings(other) != _settings(group):
                raise UserError(
                    f"train.groups: {other.match!r} and {group.match!r} disagree, and both match {name}: give them the "
                    "same lr, weight_decay and freeze, or make one match less, e.g. by ^, $ or (?!…)"
                )
    for name, parameter in model.named_parameters():
        if name in found and found[name].freeze:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        freezing = ", ".join(repr(group.match) for group in groups if group.freeze)
        by = f" (train.groups freezes what {freezing} match)" if freezing else ""
        raise UserError(
            f"every part of the model is frozen{by}: nothing would be trained; unfreeze a part in the config"
        )
    return found


def parameter_groups(
    model: nn.Module, train: cfg.TrainConfig, assigned: dict[str, cfg.GroupConfig] | None = None
) -> list[dict[str, Any]]:
    """The optimizer's groups of all that is trained, none of them empty. `assigned` is from `assign`.

    Matrices decay; biases, norms, scales and learned queries do not, unless their group says a weight_decay itself.
    """
    found: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = (assigned or {}).get(name)
            own = group.weight_decay if group else None
            is_matrix = len(deepspeed_parts.shape(parameter)) >= 2 and not name.endswith("queries")
            decay = own if own is not None else train.weight_decay if is_matrix else 0.0
            lr = group.lr if group and group.lr is not None else train.lr
            found.setdefault((group.match if group else _REST, lr, decay), []).append(parameter)
    # In the order of the config, and what decays first: groups keep their number from start to start.
    order = [*(group.match for group in train.groups), _REST]
    keys = sorted(found, key=lambda key: (order.index(key[0]), key[2] == 0.0))
    return [{"params": found[key], "lr": key[1], "weight_decay": key[2], "match": key[0]} for key in keys]


def describe(model: nn.Module, train: cfg.TrainConfig, assigned: dict[str, cfg.GroupConfig]) -> Table:
    """What trains how: a row for each pattern, and one for all others, with counts of elements."""
    rows = []
    matches = [*dict.fromkeys(group.match for group in train.groups), _REST]
    sizes: dict[str, list[int]] = {match: [0, 0] for match in matches}
    for name, parameter in model.named_parameters():
        match = assigned[name].match if name in assigned else _REST
        sizes[match][not parameter.requires_grad] += deepspeed_parts.numel(parameter)
    settings = {group.match: group for group in train.groups}
    for match in matches:
        trained, frozen = sizes[match]
        if trained or frozen:
            group = settings.get(match)
            lr = group.lr if group and group.lr is not None else train.lr
            decay = group.weight_decay if group and group.weight_decay is not None else train.weight_decay
            said = (f"{lr:g}", f"{decay:g}") if trained else ("frozen", "")
            rows.append((match, *said, f"{trained:,}", f"{frozen:,}"))
    whole = [f"{sum(size[i] for size in sizes.values()):,}" for i in (0, 1)]
    head = ("parameters that match", "lr", "weight decay", "trained", "frozen")
    return Table(head, [rows, [("all", "", "", *whole)]], align="lrrrr")


def rates(groups: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The learning rates to log: ``lr`` of the first group, and, where they differ, ``lr_group/PATTERN`` of each."""
    found = {str(group.get("match", _REST)): float(group["lr"]) for group in groups}
    named = {match: rate for match, rate in found.items() if match != _REST}
    first = found.get(_REST, next(iter(found.values())))
    if len(set(found.values())) == 1:
        return {"lr": first}
    return {"lr": first, **{f"lr_group/{_word(match)}": rate for match, rate in named.items()}}


def _word(match: str) -> str:
    """A pattern as the name of a metric."""
    return re.sub(r"[^\w.]+", "_", match).strip("_.") or "group"


def _settings(group: cfg.GroupConfig) -> dict[str, Any]:
    if group.freeze:
        return {"freeze": True}
    return {key: value for key, value in asdict(group).items() if key != "match"}


def _near(pattern: str, names: list[str]) -> str:
    """Names of parameters, and of modules that hold some, which may have been meant."""
    words = re.sub(r"\\.|[^\w.]", lambda found: "." if found[0] == r"\." else " ", pattern).split()
    wanted = max(words, key=len).strip(".") if words else ""
    modules = {".".join(name.split(".")[: i + 1]) for name in names for i in range(name.count(".") + 1)}
    ends = {module.split(".")[-1] for module in modules}
    near = difflib.get_close_matches(wanted, sorted(modules | ends), 4, cutoff=0.6)
    if not near:
        near = [
            word for part in wanted.split(".") for word in difflib.get_close_matches(part, sorted(ends), 2, cutoff=0.7)
        ]
    if near:
        return f"did you mean {', '.join(dict.fromkeys(near))}?"
    tops = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
    return f"names begin with {', '.join(tops[:8])}"
