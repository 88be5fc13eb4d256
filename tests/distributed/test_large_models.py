"""Weights larger than a rank should hold: each of two real processes reads its part of them, and writes its files."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mser_dist import config as cfg
from mser_dist import deepspeed_parts
from mser_dist.errors import UserError
from mser_dist.models import exported, partitioned, publish
from mser_dist.models.attention import Attention
from mser_dist.models.llm import build_llm
from mser_dist.models.small_llm import small_tokenizer
from mser_dist.models.weights import Weights, Writers, files_of
from tests.distributed.spawn import run
from tests.unit import tiny_exports
from tools import bench_load

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

LLAMA: dict[str, Any] = {
    "vocab_size": 371, "hidden_size": 24, "intermediate_size": 33, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
EXPERTS = {**LLAMA, "num_key_value_heads": 2, "num_local_experts": 3}


def write_llms(folder: Path) -> dict[str, Path]:
    """One for each way that weights lie on a disk, with sizes that no two ranks share evenly."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    tokenizer = small_tokenizer(cfg.SIX_EMOTIONS)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    llms: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain": (LlamaForCausalLM(LlamaConfig(**LLAMA, **special)), {}),
        "tied": (LlamaForCausalLM(LlamaConfig(**LLAMA, **special, tie_word_embeddings=True)), {}),
        "files": (LlamaForCausalLM(LlamaConfig(**LLAMA, **special)).to(torch.bfloat16), {"max_shard_size": "20KB"}),
        "experts": (MixtralForCausalLM(MixtralConfig(**EXPERTS, **special)), {}),  # stored one by one
    }
    for name, (llm, options) in llms.items():
        llm.save_pretrained(folder / name, **options)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in llms}


def loaded(rank: int, folders: dict[str, str], large: str, size: float) -> dict[str, Any]:
    """For each LLM, how it was loaded and what differs from transformers' own; of the large one, what a rank held."""
    sdpa, found = Attention("sdpa", "test"), {}
    for name, folder in folders.items():
        ways: list[bool] = []
        own = partitioned.load

        def watched(*words: Any, own: Any = own, ways: list[bool] = ways, **options: Any) -> Any:
            ways.append((model := own(*words, **options)) is not None)
            return model

        partitioned.load = watched
        config = cfg.LLMConfig(pretrained=folder)
        llm, _ = build_llm(config, cfg.SIX_EMOTIONS, sdpa, bench_load.ZERO3)
        partitioned.load = own
        plain, _ = build_llm(config, cfg.SIX_EMOTIONS, sdpa, dtype=torch.bfloat16)
        assert isinstance(llm, type(plain)) and llm.generation_config.to_dict() == plain.generation_config.to_dict()
        differ, whole = [], dict(plain.named_parameters())
        parameters = dict(llm.named_parameters())
        assert parameters.keys() == whole.keys() and not llm.training
        for each, parameter in parameters.items():
            place = torch.empty_like(whole[each])
            deepspeed_parts.gather(parameter, place)
            if (
                not torch.equal(place, whole[each])
                or deepspeed_parts.own_numel(parameter) > whole[each].numel() // 2 + 1
            ):
                differ.append(each)
        tied = llm.lm_head.weight is llm.get_input_embeddings().weight
        found[name] = {"own": ways, "differ": differ, "tied": tied}
    _, mib, _ = bench_load.load(large)
    return {"llms": found, "share": mib / size}


def test_each_rank_reads_its_part_of_an_llm(tmp_path: Path) -> None:
    """In bfloat16, bit for bit what transformers loads; of 1 GiB, no rank has more than 0.65 of it at any time."""
    size = bench_load.prepare(tmp_path / "large", 1024)
    folders = {name: str(folder) for name, folder in write_llms(tmp_path).items()}
    for found in run(loaded, 2, folders, str(tmp_path / "large"), size):
        for name, how in found["llms"].items():
            assert how == {"own": [name != "experts"], "differ": [], "tied": name == "tied"}, name
        assert 0.5 < found["share"] <= 0.65, "of the model, at the peak, on a rank"


def written(rank: int, folder: str) -> dict[str, Any]:
    model, card = tiny_exports.aligner("none")
    weights = Weights.of(model.state_dict())
    mine: list[str] = []

    def get(name: str, place: Tensor | None) -> Tensor | None:
        if place is not None:
            mine.append(name)
        return weights.get(name, place)

    writers = Writers(rank, 2, shard_bytes=4000)
    publish.write(Path(folder) / "export", model, Weights(weights.facts, get), card, writers=writers)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    said = ""
    try:
        publish.write(Path(folder) / "full", model, weights, card, writers=writers)
    except UserError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return {"mine": mine, "said": said}


def test_each_rank_writes_its_files_of_an_export(tmp_path: Path) -> None:
    one, two = run(written, 2, str(tmp_path))
    state = tiny_exports.aligner("none")[0].state_dict()
    assert sorted([*one["mine"], *two["mine"]]) == sorted(state), "each tensor is written once"
    assert all(len(found["mine"]) > len(state) / 4 for found in (one, two))
    files = files_of(tmp_path / "export", "speech")
    assert len(files) > 4
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name.removeprefix("speech.")], state[name]) for name in state if "speech." in name)
    exported.check_files(tmp_path / "export", exported.read_card(tmp_path / "export"))
    assert one["said"] == two["said"] and "File too large" in one["said"], "rank 1's failure is an error on both"
    assert not any("full" in path.name for path in tmp_path.iterdir())
