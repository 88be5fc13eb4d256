"""Which LLM families are trained and scored rightly: each is built small, and held against its own plain forward.

    python tools/check_families.py                       # a line for each family that transformers knows
    python tools/check_families.py --json families.json  # {"families": [{name, max_abs_diff, refused, …}]}
    python tools/check_families.py --write               # the lists in mser_dist/models/README.md; a test compares them

Weights are random, and the check is the one that runs before step 1 of a training (`models/self_check.py`), in fp32:
max_abs_diff is the largest difference of a loss or a label's score; shares_cache and scores_by say how answers are
scored, packing how a micro-batch is read, and why_not why not as llm.packing=prefix. About a minute on one core.
"""

import argparse
import inspect
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models.attention import Attention, for_class
from mser_dist.models.llm import check_kind
from mser_dist.models.packed import SPEECH
from mser_dist.models.self_check import check_llm
from mser_dist.models.speech import build_speech
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.progress import bar

MANUAL = Path(__file__).parents[1] / "mser_dist/models/README.md"
LARGEST = 6_000_000  # parameters: a family whose config cannot be made small is left out

_SIZES = """
32  hidden_size d_model n_embd dim conv_dim block_dim mamba_d_head
64  vocab_size intermediate_size ffn_dim n_inner ffn_hidden_size dense_intermediate_size shared_intermediate_size
64  max_position_embeddings n_positions n_ctx vocab_size_per_layer_input index_topk
16  head_dim v_head_dim attention_head_dim global_head_dim index_head_dim mamba_head_dim
16  moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
8   kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim rotary_dim
8   ssm_state_size mamba_d_state hidden_size_per_layer_input
4   num_experts n_routed_experts num_local_experts moe_num_experts
2   num_hidden_layers num_layers n_layer n_layers num_attention_heads n_head n_heads num_heads num_experts_per_tok
2   num_experts_per_token linear_num_value_heads linear_num_key_heads mamba_num_heads mamba_n_heads mamba_expand
2   index_n_heads eos_token_id
1   num_key_value_heads swa_num_key_value_heads num_global_key_value_heads n_group topk_group first_k_dense_replace
1   n_groups mamba_n_groups num_shared_experts n_shared_experts bos_token_id
0   num_nextn_predict_layers pad_token_id
"""
SMALL = {name: int(size) for size, *names in map(str.split, _SIZES.strip().splitlines()) for name in names}

_MLA = {"num_key_value_heads": 2, "head_dim": 8}
_BOTH = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
_CONV = {"layer_types": ["conv", "full_attention"]}
# What a family wants besides, or otherwise. BERT's kind is causal where its config says is_decoder.
OTHERWISE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["deepseek_v3", "deepseek_v32", "axk1", "axk2", "glm4_moe_lite", "glm_moe_dsa"], _MLA),
    **dict.fromkeys(["longcat_flash", "youtu", "dots3_note_text"], _MLA),
    "codegen": {"n_embd": 64, "n_head": 4},
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {**_BOTH, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": _BOTH,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": _CONV,
    "lfm2_moe": {**_CONV, "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "zamba": {"layer_types": ["mamba", "hybrid"], "attention_head_dim": 32},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}

_SPEECH = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 80}
_PROMPTS = [[1, 5, SPEECH, SPEECH, 6, 7], [1, 5, 9, SPEECH, SPEECH, 6, 8, 7]]
_ANSWERS = [[7, 2], [8, 9, 10, 2], [11, 2]]


def families() -> list[str]:
    """Every model type that `AutoModelForCausalLM` knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(family: str) -> Any:
    """A config of a few thousand parameters."""
    config_class = type(AutoConfig.for_model(family))
    known = set(inspect.signature(config_class.__init__).parameters) | set(config_class().to_dict())
    other_names = getattr(config_class, "attribute_map", {})
    fields: dict[str, Any] = {n: v for n, v in SMALL.items() if n in known or n in other_names} | OTHERWISE.get(
        family, {}
    )
    return config_class(**{other_names.get(n, n): v for n, v in fields.items()})


def check(family: str) -> dict[str, Any] | None:
    """The row of a family; None where it was not built here: its small config is not one that transformers takes."""
    row: dict[str, Any] = {"name": family, "max_abs_diff": None, "refused": None, "shares_cache": None}
    row |= {"scores_by": None, "packing": None, "why_not": None}
    try:
        config = small_config(family)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        check_kind(config, family)
        with torch.device("meta"):
            if sum(p.numel() for p in model_class(config).parameters()) > LARGEST:
                return None
        torch.manual_seed(0)
        config._attn_implementation = for_class(model_class, Attention("sdpa", "the check")).kernel
        config.use_cache = False  # as in training
        llm = model_class(config).eval()
        llm(input_ids=torch.tensor([[5, 6, 7]]))
    except UserError as error:
        return {**row, "refused": str(error)}
    except Exception:
        return None
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # further from uniform than an initialisation: differences show
    attention = Attention("sdpa", "the check")
    qformer = cfg.QFormerConfig(queries=2, layers=1, width=16, heads=2, dropout=0.0)
    try:
        model = SpeechLLM(build_speech(cfg.EncoderConfig(arch=_SPEECH), qformer, attention), llm)
        checked = check_llm(model, _PROMPTS, _ANSWERS, "cpu", "prefix")
    except UserError as error:
        return {**row, "refused": str(error)}
    return {
        **row,
        "max_abs_diff": checked.difference,
        "shares_cache": checked.shares_cache,
        "scores_by": checked.scores_by,
        "packing": checked.packing,
        "why_not": checked.not_packed,
    }


def lists(rows: list[dict[str, Any]]) -> str:
    """The families by what becomes of them, as the manual shows them."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row["refused"] is None:
            group = "answers read the prompt's cache" if row["shares_cache"] else "scored by whole forward passes"
        elif "encoder-decoder" in row["refused"]:
            group = "refused, encoder-decoder"
        elif "sees or hears" in row["refused"]:
            group = "refused, sees or hears"
        elif "not causal" in row["refused"]:
            group = "refused, not causal unless its config says `is_decoder`"
        else:
            group = "refused, cannot be given a prompt with speech"
        groups.setdefault(group, []).append(row["name"])
    for row in rows:
        if row["packing"] in ("rows", "off"):
            groups.setdefault(f"packed by `{row['packing']}`, not by `prefix`", []).append(row["name"])
    return "".join(f"| {group} ({len(names)}) | {', '.join(names)} |\n" for group, names in sorted(groups.items()))


def in_manual(text: str) -> tuple[str, str, str]:
    """The manual before, in and behind the rows of the families."""
    before, rows, behind = re.split(
        r"(?<=\|---\|---\|\n)((?:\| (?:answers|scored|packed|refused).*\n)+)", text, maxsplit=1
    )
    return before, rows, behind


def main() -> None:
    """Check the families that are named, or all of them, and print, store or write down what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model types (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the rows here")
    parser.add_argument("--write", action="store_true", help="update the lists in the manual of models/")
    given = parser.parse_args()
    rows = walk(given.families or families())
    for row in rows:
        print(f"{row['name']:28} {row['refused'] or format(row['max_abs_diff'], '.1e')}")
    if given.json:
        given.json.write_text(json.dumps({"families": rows}, indent=1), encoding="utf-8")
    if given.write:
        before, _, behind = in_manual(MANUAL.read_text(encoding="utf-8"))
        MANUAL.write_text(before + lists(rows) + behind, encoding="utf-8")


def walk(names: list[str]) -> list[dict[str, Any]]:
    """The rows of families; those that could not be built small are named on stderr."""
    transformers.logging.set_verbosity_error()
    rows, left_out = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in bar(names, title="families", unit="family", total=len(names)):
            row = check(name)
            rows.append(row) if row else left_out.append(name)
    if left_out:
        print(f"not built here: {', '.join(left_out)}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    main()
