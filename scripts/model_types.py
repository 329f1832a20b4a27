"""Which causal language models of transformers run here, and how: every one of them is built small and compared.

Each gets random weights, answers prompts that share prefixes in each sharing mode, cold and warm, and is compared token
by token with transformers' `generate`. The result is docs/reference/models.md; --check says where it differs.

    python scripts/model_types.py                     # all, some ten minutes; writes the page
    python scripts/model_types.py --only llama,lfm2   # writes the lines of these
    python scripts/model_types.py --check             # compares all with the page, and writes nothing
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "models.md"
SECONDS = 240  # that one of them may take
sys.path.insert(0, str(ROOT / "tests"))

# By any of the names that configurations use. What a configuration does not have is left out.
_LAYERS = 4
_SMALL: dict[str, Any] = (
    dict.fromkeys(("vocab_size", "n_vocab"), 199)
    | dict.fromkeys(("hidden_size", "d_model", "n_embd", "model_dim", "dim"), 48)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"), 64)
    | dict.fromkeys(("expert_ffn_hidden_size", "num_experts_per_layer"), 4)
    | dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), _LAYERS)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4)
    | dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2)
    | dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "v_head_dim", "qk_nope_head_dim"), 16)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length"), 512)
    | dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"), 2)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24)
    | dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_mem_blocks"), 1)
    | dict.fromkeys(("initializer_range", "init_std"), 0.3)
    | {
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "word_embed_proj_dim": 48, "rotary_dim": 8,
        "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_expand": 2,
        "mamba_chunk_size": 16, "mamba_num_heads": 6, "mamba_head_dim": 16, "ssm_state_size": 8, "state_size": 8,
        "n_groups": 2, "chunk_size": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 199,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What came of one model type.

    Attributes:
        outcome: ``native``, ``transformers``, ``refused``, ``not built``, or ``differs``, which is a defect.
        note: why.
        states: whether it has recurrent layers.
    """

    type: str
    name: str
    outcome: str
    note: str = ""
    states: bool = False


def causal_types() -> dict[str, str]:
    """The model types that transformers has a causal language model for, and the names of its classes."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {kind: name for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if kind in CONFIG_MAPPING}


def build(kind: str) -> Any:
    """A small random fp32 model of a type."""
    import torch
    import transformers

    from architectures import ARCHITECTURES, RECURRENT, make_model

    name = causal_types()[kind]
    config_class = transformers.CONFIG_MAPPING[kind]
    text_class = getattr(transformers, name).config_class
    if text_class in getattr(config_class, "sub_configs", {}).values():  # of text and more; the text alone is a model
        config_class = text_class
    for known, (known_config, model_class, _) in (ARCHITECTURES | RECURRENT).items():
        if (known_config, model_class) == (config_class.__name__, name):
            return make_model(known)
    fields = vars(config_class())
    given = {key: value for key, value in _SMALL.items() if key in fields or key in config_class.attribute_map}
    config = config_class(**given)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).float().eval()
    model.requires_grad_(False)
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > 50e6:
        raise ValueError(f"it has {size:,} weights still")
    return model


def judge(kind: str) -> Result:
    """Build a model, and compare what it answers."""
    import torch
    import transformers

    from architectures import VOCAB, reference
    from gossamer.engine.engine import Engine
    from gossamer.errors import GossamerError
    from gossamer.models.support import check_supported
    from gossamer.options import SHARING_MODES, EngineOptions
    from gossamer.runners.native import NativeRunner, why_not_native
    from gossamer.runners.transformers import IMPLEMENTATION, TransformersRunner
    from test_exactness import NumberTokenizer, answers, prompts_of

    name = causal_types()[kind]
    transformers.logging.set_verbosity_error()
    prompts = prompts_of([[40], [30, 3], [9, 1, 20, 12]], random.Random(0))
    try:
        model = build(kind)
    except Exception as error:  # whatever a configuration wants that the recipe does not know
        return Result(kind, name, "not built", _line(error))
    config = model.config
    try:
        check_supported(config)
        expected = [reference(model)([token % VOCAB for token in prompt], 6) for prompt in prompts]
    except GossamerError as error:
        return Result(kind, name, "refused", _reason(error))
    except Exception as error:  # generate itself does not run on a model this small
        return Result(kind, name, "not built", _line(error))
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        runner: Any = TransformersRunner(model)
    except GossamerError as error:
        return Result(kind, name, "refused", _reason(error))
    except Exception as error:  # of the model's own code, which meets packed rows for the first time
        return Result(kind, name, "refused", f"it cannot be called as this engine calls models: {_line(error)}")
    states = runner.layout.state_bytes > 0
    outcome = "transformers"
    with torch.inference_mode():
        runners = [("transformers", runner)]
        if not why_not_native(model):
            runners.append(("native", NativeRunner(model, max_rows=2048)))
            outcome = "native"
        for which, each in runners:
            if which == "transformers" and len(runners) == 2:
                continue  # the native runner has taken its weights
            for sharing in SHARING_MODES:
                engine = Engine(each, NumberTokenizer(), EngineOptions(sharing=sharing, max_num_batched_tokens=37))
                for warmth in ("cold", "warm"):
                    try:
                        found = answers(engine, prompts, 6)
                    except GossamerError as error:
                        return Result(kind, name, "refused", _reason(error), states)
                    if found != expected:
                        return Result(kind, name, "differs", f"{which}, sharing {sharing}, {warmth}", states)
    return Result(kind, name, outcome, "", states)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _reason(error: Exception) -> str:
    """Of a refusal, without what it says about other models."""
    text = " ".join(str(error).split())
    return re.sub(r"^\w+: ", "", text).split(". Supported model types")[0][:240]


def judge_apart(kind: str) -> Result:
    """The same in a process of its own: some of these models never end, or end the process."""
    command = [sys.executable, __file__, "--one", kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return Result(kind, causal_types()[kind], "not built", f"takes more than {SECONDS} seconds, small as it is")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return Result(kind, causal_types()[kind], "not built", f"its process ended with {done.returncode}")
    return Result(**json.loads(lines[-1]))


def page(results: list[Result]) -> str:
    """docs/reference/models.md."""
    import transformers

    counts = {
        outcome: sum(each.outcome == outcome for each in results) for outcome in ("native", "transformers", "refused")
    }
    text = [
        "# Models",
        "",
        "<!-- written by scripts/model_types.py -->",
        "",
        f"Every causal language model of transformers {transformers.__version__}, built small with random weights,",
        "and compared with transformers' `generate`: greedy tokens in fp32, of prompts that share prefixes, in chunks,",
        f"cold and warm, in each sharing mode. {counts['native']} run in the native kernels,",
        f"{counts['transformers']} in PyTorch through transformers,",
        f"{counts['refused']} are refused, with the reason. The others could not be",
        "built small by one recipe, which says nothing about the real ones: what loads is run, and what cannot be run",
        "exactly is refused when it is loaded.",
        "",
        "`python scripts/model_types.py` writes this page; `make test-slow` compares it with what is found.",
        "",
        "| model type | runs in | states | note |",
        "|---|---|---|---|",
    ]
    order = {"native": 0, "transformers": 1, "refused": 2, "not built": 3, "differs": 4}
    for each in sorted(results, key=lambda each: (order[each.outcome], each.type)):
        note = each.note.replace("|", "\\|").replace("<", "&lt;")
        text.append(f"| `{each.type}` | {each.outcome} | {'yes' if each.states else ''} | {note} |")
    return "\n".join(text) + "\n"


def on_page() -> dict[str, Result]:
    """What the page says, by type."""
    rows = re.findall(r"^\| `([^`]+)` \| ([a-z ]+) \| (yes)? *\| (.*?) *\|$", PAGE.read_text(), re.MULTILINE)
    unescaped = {kind: note.replace("\\|", "|").replace("&lt;", "<") for kind, _, _, note in rows}
    return {kind: Result(kind, "", outcome, unescaped[kind], bool(states)) for kind, outcome, states, _ in rows}


def written() -> dict[str, str]:
    """The outcomes on the page, by type."""
    return {kind: result.outcome for kind, result in on_page().items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, with commas between them")
    parser.add_argument("--check", action="store_true", help="compare with the page")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if given.one:
        warnings.simplefilter("ignore")
        importlib.import_module("torch").set_num_threads(1)
        print(json.dumps(asdict(judge(given.one))))
        return 0
    kinds = given.only.split(",") if given.only else sorted(causal_types())
    if unknown := [kind for kind in kinds if kind not in causal_types()]:
        print(f"transformers has no causal language model of type {unknown[0]!r}", file=sys.stderr)
        return 2
    results = []
    with ThreadPoolExecutor(given.processes) as pool:
        for done, result in enumerate(pool.map(judge_apart, kinds), 1):
            print(f"[{done}/{len(kinds)}] {result.type}: {result.outcome} {result.note}", file=sys.stderr, flush=True)
            results.append(result)
    if given.check:
        before = written()
        changed = [each for each in results if before.get(each.type) != each.outcome]
        for each in changed:
            print(f"{each.type}: {before.get(each.type)} on the page, {each.outcome} now {each.note}")
        return 1 if changed or any(each.outcome == "differs" for each in results) else 0
    known = on_page() if given.only else {}
    PAGE.write_text(page(list((known | {each.type: each for each in results}).values())))
    return 1 if any(each.outcome == "differs" for each in results) else 0


if __name__ == "__main__":
    sys.exit(main())
