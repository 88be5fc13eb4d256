import importlib.machinery
import importlib.util
from collections.abc import Callable

import pytest
import torch

from mser_dist.errors import UserError
from mser_dist.models.attention import Attention, choose, supported_by

HALF = torch.bfloat16
FLASH = ("flash_attention_2", "flash_attention_3")
BOTH = {"flash_attn", "flash_attn_interface"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[str], tuple[int, int]], None]:
    """Pretend that these modules are installed beside a GPU of this compute capability."""

    def pretend(modules: set[str], capability: tuple[int, int]) -> None:
        def find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
            return importlib.machinery.ModuleSpec(name, None) if name in modules else None

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend


def test_auto_on_a_cpu_is_sdpa_and_says_why() -> None:
    found = choose("auto", torch.float32, "cpu")
    assert found.kernel == "sdpa"
    assert "it needs a CUDA GPU and there is none" in found.reason
    assert all(kernel in found.reason for kernel in FLASH)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_kernels_that_always_run(kernel: str) -> None:
    assert choose(kernel, torch.float32, "cpu") == Attention(kernel, "asked for", named=True)


@pytest.mark.parametrize("kernel", FLASH)
def test_asking_for_flash_on_a_cpu_is_refused(kernel: str) -> None:
    with pytest.raises(UserError, match=rf"kernel {kernel} cannot run: .*CUDA GPU.*attention to auto") as caught:
        choose(kernel, HALF, "cpu")
    assert "\n" not in str(caught.value)


def test_an_unknown_kernel_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="fast"):
        choose("fast", HALF, "cpu")


@pytest.mark.parametrize(
    ("modules", "capability", "dtype", "kernel", "reason"),
    [
        (BOTH, (9, 0), HALF, "flash_attention_3", "package, GPU and dtype allow it"),
        (BOTH, (8, 0), HALF, "flash_attention_2", "package, GPU and dtype allow it"),
        (BOTH, (10, 0), HALF, "flash_attention_2", "package, GPU and dtype allow it"),
        ({"flash_attn"}, (9, 0), torch.float16, "flash_attention_2", "package, GPU and dtype allow it"),
        (
            {"flash_attn_interface"},
            (8, 6),
            HALF,
            "sdpa",
            "flash_attention_3: it needs a GPU of compute capability 9.x, this one has 8.6",
        ),
        (
            BOTH,
            (7, 5),
            HALF,
            "sdpa",
            "flash_attention_2: it needs a GPU of compute capability 8.0 or more, this one has 7.5",
        ),
        (set(), (9, 0), HALF, "sdpa", "flash_attention_2: the Python module flash_attn is not installed"),
        (BOTH, (9, 0), torch.float32, "sdpa", "flash_attention_2: it needs bfloat16 or float16, not float32"),
    ],
)
def test_what_auto_takes_on_a_gpu(
    gpu: Callable[[set[str], tuple[int, int]], None],
    modules: set[str],
    capability: tuple[int, int],
    dtype: torch.dtype,
    kernel: str,
    reason: str,
) -> None:
    gpu(modules, capability)
    found = choose("auto", dtype, "cuda")
    assert found.kernel == kernel
    assert reason in found.reason


@pytest.mark.parametrize(
    ("modules", "capability", "dtype", "says"),
    [
        (set(), (9, 0), HALF, r"pip install 'mser-dist\[flash-attn\]'"),
        (BOTH, (7, 5), HALF, "compute capability 8.0 or more, this one has 7.5"),
        (BOTH, (8, 0), torch.float32, "needs bfloat16 or float16, not float32"),
    ],
)
def test_asking_for_flash_names_the_missing_thing(
    gpu: Callable[[set[str], tuple[int, int]], None],
    modules: set[str],
    capability: tuple[int, int],
    dtype: torch.dtype,
    says: str,
) -> None:
    gpu(modules, capability)
    with pytest.raises(UserError, match=says):
        choose("flash_attention_2", dtype, "cuda")


def test_asking_for_flash_where_it_runs(gpu: Callable[[set[str], tuple[int, int]], None]) -> None:
    gpu(BOTH, (9, 0))
    assert [choose(kernel, HALF, "cuda").kernel for kernel in FLASH] == list(FLASH)


def test_models_without_a_flash_path_get_sdpa() -> None:
    class With:
        _supports_flash_attn = True

    class Without:
        pass

    flash = Attention("flash_attention_2", "asked for")
    assert supported_by(With, flash) is flash
    fallback = supported_by(Without, flash)
    assert fallback.kernel == "sdpa" and "Without" in fallback.reason
    eager = Attention("eager", "asked for")
    assert supported_by(Without, eager) is eager


HUB = ("kernels-community/flash-attn2", "kernels-community/vllm-flash-attn3")


def test_kernels_of_the_hub_are_taken_by_name_alone(gpu: Callable[[set[str], tuple[int, int]], None]) -> None:
    """They are code that is fetched: what stands in the log line is why they are not taken."""
    gpu({"kernels"}, (9, 0))
    found = choose("auto", HALF, "cuda")
    assert found.kernel == "sdpa" and all(f"{kernel}: by name alone" in found.reason for kernel in HUB)
    gpu(set(), (9, 0))
    assert "kernels-community" not in choose("auto", HALF, "cuda").reason
    with pytest.raises(UserError, match=r"the Python module kernels is not installed \(`pip install kernels`\)"):
        choose(HUB[0], HALF, "cuda")


@pytest.mark.skipif(importlib.util.find_spec("kernels") is not None, reason="kernels is installed")
def test_a_kernel_of_the_hub_that_does_not_load_is_one_line(gpu: Callable[[set[str], tuple[int, int]], None]) -> None:
    gpu({"kernels"}, (9, 0))  # as it seems: transformers then does not find it
    with pytest.raises(UserError, match="the hub's kernels-community/flash-attn2 cannot be loaded") as caught:
        choose(HUB[0], HALF, "cuda")
    assert "\n" not in str(caught.value)
