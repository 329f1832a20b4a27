"""Compare the first token of answers with llama.cpp's on the same GGUF file: the imported model is the file's model.

    LLAMA_CPP_PYTHON=.venv-bench/llama.cpp/bin/python .venv/bin/python scripts/first_tokens.py

Prompts are a question about each of some paragraphs of Python's language reference, in the model's chat template. Both
see the same token ids, and llama.cpp's own tokenizer is asked as well. Printed are Kullback-Leibler divergences of the
distributions of the next token, in nats, and how often the most probable token is the same: of transformers with
the values of the file's weights in fp32, and of `LLM(file)`. llama.cpp rounds activations to 8 bit, and so does it,
by rules of its own, so the distributions are not equal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from gossamer import LLM, SamplingParams
from gossamer.models.catalog import find_model
from gossamer.models.fetch import fetch
from gossamer.models.load import load_model
from gossamer.options import ModelOptions
from gossamer.texts import reference_text

ROOT = Path(__file__).parents[1]
PEER = os.environ.get("LLAMA_CPP_PYTHON", str(ROOT / ".venv-bench/llama.cpp/bin/python"))
QUESTIONS = (
    "What is this about?",
    "Is this true? Answer yes or no.",
    "Say it in other words.",
    "Which word matters most?",
)
ASK = """
import json, sys
import numpy as np
import llama_cpp
prompts = json.load(open(sys.argv[2]))
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
rows, same = [], 0
for prompt in prompts:
    same += model.tokenize(prompt["text"].encode(), add_bos=False, special=True) == prompt["ids"]
    model.reset()
    model.eval(prompt["ids"])
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), shape=(model.n_vocab(),))
    rows.append(logits.astype(np.float32).copy())
np.save(sys.argv[3], np.stack(rows))
print(json.dumps([llama_cpp.__version__, same]))
"""


def make_prompts(tokenizer: object, count: int) -> list[dict[str, object]]:
    """Texts and ids of conversations up to where the answer begins."""
    paragraphs = [text for text in reference_text().split("\n\n") if 60 < len(text) < 240][::3]
    prompts = []
    for number, paragraph in enumerate(paragraphs[:count]):
        message = {"role": "user", "content": f"{' '.join(paragraph.split())}\n\n{QUESTIONS[number % len(QUESTIONS)]}"}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        prompts.append({"text": text, "ids": tokenizer.encode(text, add_special_tokens=False)})
    return prompts


def of_llm(file: Path, prompts: list[dict[str, object]], vocabulary: int) -> torch.Tensor:
    """The log-probabilities of all first tokens, ``[prompts, tokens]``, as a user's program gets them."""
    llm = LLM(file)
    print(f"LLM(file) computes with weights {llm.weights}")
    rows = torch.full((len(prompts), vocabulary), -torch.inf, dtype=torch.float64)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=vocabulary, ignore_eos=True)
    for row, prompt in zip(rows, prompts, strict=True):
        (output,) = llm.generate({"prompt_token_ids": prompt["ids"]}, params, use_tqdm=False)
        (first,) = output.outputs[0].logprobs
        row[torch.tensor(list(first))] = torch.tensor([each.logprob for each in first.values()], dtype=torch.float64)
    return rows


def report(name: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Print how far ``ours`` is from ``theirs``, both log-probabilities ``[prompts, tokens]``."""
    kl = (theirs.exp() * (theirs - ours)).sum(1)
    distance = (theirs.exp() - ours.exp()).abs().sum(1) / 2
    same = theirs.argmax(1) == ours.argmax(1)
    print(
        f"{name}: KL {kl.mean():.5f} on average, {kl.median():.5f} median, {kl.max():.4f} at most; total variation "
        f"{distance.mean():.4f}; same first token {int(same.sum())} of {len(same)}"
    )


def main() -> None:
    """Fetch the file, ask both, print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--gguf", type=Path, help="a file; the catalogue's smollm2-135m otherwise")
    arguments.add_argument("--prompts", type=int, default=200)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        entry = find_model("smollm2-135m")
        assert entry is not None
        file = given.gguf or fetch(entry, Path(directory))
        network, tokenizer = load_model(file, options=ModelOptions(weights="dequantized"))
        prompts = make_prompts(tokenizer, given.prompts)
        asked, answered = Path(directory) / "prompts.json", Path(directory) / "logits.npy"
        asked.write_text(json.dumps(prompts))
        command = [PEER, "-c", ASK, str(file), str(asked), str(answered)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        version, same = json.loads(run.stdout.strip().splitlines()[-1])
        theirs = torch.from_numpy(np.load(answered)).double().log_softmax(-1)
        print(
            f"{file.name}, {len(prompts)} prompts, llama-cpp-python {version}; same token ids: {same} of {len(prompts)}"
        )
        with torch.inference_mode():
            rows = [network(torch.tensor([prompt["ids"]])).logits[0, -1] for prompt in prompts]
        exact = torch.stack(rows).double().log_softmax(-1)
        report("fp32 against llama.cpp", theirs, exact)
        del network
        ours = of_llm(file, prompts, theirs.shape[1])
        report("LLM(file) against llama.cpp", theirs, ours)
        report("LLM(file) against fp32", exact, ours)


if __name__ == "__main__":
    main()
