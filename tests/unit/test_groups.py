import re

import pytest
import torch
from torch import nn

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.training.groups import assign, describe, parameter_groups, rates


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.queries = nn.Parameter(torch.zeros(1, 2, 4))
        self.scales = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def config(*groups: cfg.GroupConfig) -> cfg.TrainConfig:
    return cfg.TrainConfig(lr=1e-3, weight_decay=0.3, groups=list(groups))


def named(model: nn.Module, train: cfg.TrainConfig) -> dict[tuple[str, float, float], set[str]]:
    """The names of the parameters of each group: (pattern, lr, weight decay)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, train, assign(model, train.groups))
    return {(g["match"], g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}


REST = {"queries", "scales", "linear.bias", "norm.weight", "norm.bias", "conv.bias"}


def test_only_matrices_decay() -> None:
    assert named(Model(), config()) == {
        ("(all others)", 1e-3, 0.3): {"linear.weight", "conv.weight"},
        ("(all others)", 1e-3, 0.0): REST,
    }


def test_partitioned_matrices_decay_too() -> None:
    model = nn.Linear(4, 4)
    model.weight.ds_shape = model.weight.shape  # type: ignore[attr-defined]  # what ZeRO-3 leaves: the shape beside a flat part
    model.weight.data = model.weight.data.flatten()[:2]
    decayed, plain = parameter_groups(model, config())
    assert (decayed["params"], plain["params"]) == ([model.weight], [model.bias])


def test_empty_groups_are_left_out() -> None:
    assert parameter_groups(Model().requires_grad_(False), config()) == []
    assert [group["weight_decay"] for group in parameter_groups(nn.LayerNorm(3), config())] == [0.0]


def test_groups_have_their_own_rates_and_what_they_leave_open_is_that_of_the_others() -> None:
    slow, plain = cfg.GroupConfig(match="^linear", lr=1e-5), cfg.GroupConfig(match=r"norm\.|scales", weight_decay=0.1)
    model, train = Model(), config(slow, plain, cfg.GroupConfig(match="conv", freeze=True))
    assert named(model, train) == {
        ("^linear", 1e-5, 0.3): {"linear.weight"},
        ("^linear", 1e-5, 0.0): {"linear.bias"},
        (r"norm\.|scales", 1e-3, 0.1): {"norm.weight", "norm.bias", "scales"},  # said itself: of biases too
        ("(all others)", 1e-3, 0.0): {"queries"},
    }
    table = str(describe(model, train, assign(model, train.groups)))
    cells = [re.split(r"\s{2,}", line) for line in table.splitlines()]
    assert ["^linear", "1e-05", "0.3", "20", "0"] in cells and ["conv", "frozen", "0", "52"] in cells
    assert ["(all others)", "0.001", "0.3", "8", "20"] in cells and ["all", "38", "72"] in cells
    groups = parameter_groups(model, train, assign(model, train.groups))
    assert rates(groups) == {"lr": 1e-3, "lr_group/linear": 1e-5, "lr_group/norm_._scales": 1e-3}
    assert rates(parameter_groups(Model(), config())) == {"lr": 1e-3}


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([{"match": "liner", "lr": 1.0}], "'liner' matches no parameter: did you mean linear"),
        ([{"match": r"^conv\.wieght$"}], r"matches no parameter: did you mean conv\.weight"),
        ([{"match": "xyz"}], "names begin with queries, scales, linear.weight"),
        ([{"match": "linear", "lr": 1.0}, {"match": "weight", "lr": 2.0}], "'linear' and 'weight' disagree.*linear.w"),
        ([{"match": ".", "freeze": True}], "every part of the model is frozen .*'.' match"),
    ],
)
def test_mistakes_are_one_line(groups: list[dict[str, object]], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        assign(Model(), [cfg.GroupConfig(**group) for group in groups])  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_patterns_of_the_same_settings_may_overlap() -> None:
    groups = [cfg.GroupConfig(match="linear", lr=0.5), cfg.GroupConfig(match="weight", lr=0.5)]
    assert {group.lr for group in assign(Model(), groups).values()} == {0.5}
