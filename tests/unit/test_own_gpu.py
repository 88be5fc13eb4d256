"""What is done for the GPUs of a machine, as far as it can be told without one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mser_dist import config as cfg
from mser_dist.cli import demo
from mser_dist.errors import UserError
from mser_dist.models.attention import Attention
from mser_dist.models.speech import build_speech
from mser_dist.ranks import distributed


class Told:
    """A store whose other ranks have said what they have."""

    def __init__(self, others: list[str]) -> None:
        self.others = others

    def to_main(self, mine: str) -> list[str]:
        return [mine, *self.others]

    def agree(self, value: Any) -> Any:
        return value


def test_ranks_that_share_a_gpu_are_told_so_before_nccl_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}"))
    monkeypatch.setattr(distributed.socket, "gethostname", lambda: "node1")
    for others in ([], ["node1, GPU-1"], ["node2, GPU-0", "node2, GPU-1"]):
        monkeypatch.setattr(distributed, "_store", Told(others))
        distributed._check_own_gpu(0)
    monkeypatch.setattr(distributed, "_store", Told(["node1, GPU-1", "node1, GPU-0"]))
    with pytest.raises(UserError, match=r"ranks 0 and 2 have one GPU \(node1, GPU-0\).*--nproc") as caught:
        distributed._check_own_gpu(0)
    assert "\n" not in str(caught.value) and caught.value.code == 2


@pytest.mark.parametrize(("gpus", "processes"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_the_demo_has_a_gpu_for_each_process(gpus: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert demo._processes() == processes


def test_convolutions_are_computed_as_precisely_as_products() -> None:
    """By torch's default those of float32 are made in TF32 on a GPU."""
    arch = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 80}
    qformer = cfg.QFormerConfig(queries=2, layers=1, width=16, heads=2)
    speech = build_speech(cfg.EncoderConfig(arch=arch), qformer, Attention("sdpa", "test"))
    encoder: Any = speech.any_encoder
    seen = []
    encoder.whisper.conv1.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    assert torch.backends.cudnn.allow_tf32, "torch's default has changed"
    for allowed in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        encoder(torch.randn(1, 80, 20), torch.tensor([20]))
    with pytest.raises(UserError, match="longer than the encoder's"):
        encoder(torch.randn(1, 80, 4000), torch.tensor([4000]))
    assert seen == [True, False] and torch.backends.cudnn.allow_tf32, "as it was before"


def test_the_tests_of_the_cpu_see_no_gpu() -> None:
    assert torch.cuda.device_count() == 0
