"""The losses on one process, against their formulae written out."""

import math

import pytest
import torch
from torch import Tensor

from mser_dist.contrastive import parallel_speech_loss, speech_text_loss

N, D = 10, 8
SCALE = torch.tensor(14.0)


def unit(seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(N, D, generator=torch.Generator().manual_seed(seed)), dim=-1)


def supcon(x: Tensor, y: Tensor, positive: list[list[int]], candidates: list[list[int]]) -> list[float]:
    """Equation 2 of arXiv 2004.11362, in loops and double precision."""
    x, y = x.double(), y.double()
    losses = []
    for i, own in enumerate(positive):
        if own:
            total = sum(math.exp(14.0 * float(x[i] @ y[a])) for a in candidates[i])
            losses.append(-sum(math.log(math.exp(14.0 * float(x[i] @ y[p])) / total) for p in own) / len(own))
    return losses


def test_speech_text_is_supcon_in_both_directions() -> None:
    speech, text, label = unit(0), unit(1), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 3, 1])
    positive = [[j for j in range(N) if label[j] == label[i]] for i in range(N)]
    everything = [list(range(N))] * N
    expected = supcon(speech, text, positive, everything) + supcon(text, speech, positive, everything)
    out = speech_text_loss(speech, text, label, SCALE)
    assert float(out.loss) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    floor = sum(math.log(len(p)) for p in positive) / N
    assert float(out.loss - out.excess) == pytest.approx(floor, rel=1e-5)


def test_with_unique_labels_it_is_clips_loss() -> None:
    speech, text = unit(0), unit(1)
    logits, target = SCALE * speech @ text.T, torch.arange(N)
    clip = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(speech_text_loss(speech, text, target, SCALE).loss, clip)


def test_the_floor_is_reached_when_the_classes_are_apart() -> None:
    label = torch.arange(N) % 2
    corners = torch.eye(D)[label]
    out = speech_text_loss(corners, corners, label, torch.tensor(100.0))
    assert float(out.loss) == pytest.approx(math.log(N / 2), abs=1e-5)
    assert float(out.excess) == pytest.approx(0.0, abs=1e-5)
    assert float(out.accuracy) == 1.0 and float(out.positives) == N / 2


def test_parallel_clips_attract_and_their_own_emotion_is_no_negative() -> None:
    speech = unit(2)
    source = torch.tensor([0, 1, 0, 1, 2, 3, 3, 3, 4, 5])
    label = torch.tensor([0, 1, 0, 1, 0, 2, 2, 2, 1, 0])
    positive = [[j for j in range(N) if source[j] == source[i] and j != i] for i in range(N)]
    candidates = [[j for j in range(N) if j in positive[i] or label[j] != label[i]] for i in range(N)]
    expected = supcon(speech, speech, positive, candidates)
    out = parallel_speech_loss(speech, source, label, SCALE)
    assert float(out.loss) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_without_parallel_clips_the_term_is_zero_with_a_zero_gradient() -> None:
    speech = unit(3).requires_grad_()
    out = parallel_speech_loss(speech, torch.arange(N), torch.zeros(N, dtype=torch.long), SCALE)
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0
    assert speech.grad is not None and not speech.grad.any()


@pytest.mark.parametrize("same", [True, False])
def test_identical_embeddings_at_scale_100_stay_finite(same: bool) -> None:
    speech = torch.ones(N, D) / math.sqrt(D)
    speech.requires_grad_()
    label = torch.zeros(N, dtype=torch.long) if same else torch.arange(N)
    out = speech_text_loss(speech, speech, label, torch.tensor(100.0))
    out.loss.backward()
    assert torch.isfinite(out.loss) and speech.grad is not None and torch.isfinite(speech.grad).all()


def test_the_loss_is_computed_in_fp32_under_autocast() -> None:
    speech, text, label = unit(0), unit(1), torch.arange(N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = speech_text_loss(speech, text, label, torch.tensor(100.0)).loss
    torch.testing.assert_close(inside, speech_text_loss(speech, text, label, torch.tensor(100.0)).loss, rtol=0, atol=0)
