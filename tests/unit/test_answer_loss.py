import pytest
import torch
from torch import nn

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models.answer_loss import IGNORE, answer_loss, answers_right
from mser_dist.training.best import stalled_for
from mser_dist.training.class_weights import class_weights

TARGET = torch.tensor([3, IGNORE, 1, 1, IGNORE, 0])


def logits() -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def test_weights_are_those_of_torch_where_a_class_is_a_token() -> None:
    by_token = torch.tensor([0.5, 2.0, 1.0, 3.0, 1.0])
    weights = torch.tensor([3.0, 2.0, 2.0, 0.5])  # of the four tokens that count
    found = answer_loss(logits(), TARGET, weights) / weights.sum()
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits(), TARGET, weight=by_token))
    ones = torch.ones(4)
    torch.testing.assert_close(answer_loss(logits(), TARGET, ones), answer_loss(logits(), TARGET))
    assert answers_right(logits(), TARGET, ones) == answers_right(logits(), TARGET)


def test_smoothing_wants_a_share_of_the_whole_vocabulary() -> None:
    log_p, at = logits().log_softmax(-1), TARGET != IGNORE
    wanted = 0.9 * nn.functional.one_hot(TARGET[at], 5) + 0.1 / 5
    expected = -(wanted * log_p[at]).sum()
    for weights in (None, torch.ones(4)):
        torch.testing.assert_close(answer_loss(logits(), TARGET, weights, 0.1), expected)


def test_balanced_labels_count_the_same_in_sum_and_a_clip_counts_1_on_average() -> None:
    labels, counts = ["a", "b", "c", "d"], [6, 3, 1, 0]
    weights = class_weights("balanced", labels, counts)
    assert weights is not None
    assert [w * n for w, n in zip(weights, counts, strict=True)] == pytest.approx([10 / 3] * 3 + [0])
    assert class_weights({"b": 2.5}, labels, counts) == [1.0, 2.5, 1.0, 1.0]
    assert class_weights("none", labels, counts) is None


def test_patience_counts_from_the_first_best_validation_and_not_beyond_the_step() -> None:
    notes = {step: {"ua": ua} for step, ua in {2: 0.3, 4: 0.5, 6: 0.5, 8: 0.4, 10: 0.9}.items()}
    assert [stalled_for(notes, step) for step in (0, 2, 4, 6, 8, 10)] == [0, 0, 0, 1, 2, 0]


def test_what_cannot_be_is_refused() -> None:
    config = cfg.Stage2(stage1="a", train=cfg.TrainConfig(class_weights={"angry": 2.0}))
    config.data.sets = ["a"]
    with pytest.raises(UserError, match=r"train.class_weights names angry, which is none of data.labels .anger, "):
        config.check()
    config.train = cfg.TrainConfig(patience=3)
    with pytest.raises(UserError, match=r"train.patience=3 counts validations: set train.val_every"):
        config.check()
    config = cfg.Stage2(stage1="a", align=0.5, freeze_qformer=True)
    config.data.sets = ["a"]
    with pytest.raises(UserError, match=r"align=0.5 trains what hears, and .* set freeze_qformer=false, or align=0"):
        config.check()
