#!/usr/bin/env bash
# Ray's prefix router for language models, where all prompts begin alike.
#
# One would guess: a router that keeps prompts with equal prefixes together sends 16 groups of prompts to two replicas in
# halves, and goes on doing so when a system prompt of 400 characters is put in front of all of them.
# What happens: a match of a tenth of the prompt is enough for the replica that has it, whatever the others have in hand. The
# common head is such a match, so that the replica with the first prompt gets all of them, and the other one none.
# Version: ray 2.60.0, with the defaults of its router (match_rate_threshold 0.1, imbalanced_threshold inf).
# Source: this script; ray/llm/_internal/serve/routing_policies/prefix_aware/prefix_aware_router.py and prefix_tree.py. The
# tree is Ray's; its choice (the longest match from the threshold on, otherwise the smallest tree) is written out here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "ray[serve]==2.60.0"
"$folder/venv/bin/python" - <<'PYTHON'
import random
import string
import sys
import time

import ray
from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTree

THRESHOLD = 0.1
draw = random.Random(0)


def text(length):
    return "".join(draw.choices(string.ascii_lowercase + " ", k=length))


def split(head):
    """How many prompts each of two replicas gets."""
    groups = [head + text(2600) for _ in range(16)]
    prompts = [group + text(100) for group in groups for _ in range(8)]
    draw.shuffle(prompts)
    replicas = ["one", "two"]
    tree, got = PrefixTree(), dict.fromkeys(replicas, 0)
    tree.add_tenants(replicas, time.time())
    for prompt in prompts:
        matched, holders = tree.prefix_match(prompt, replicas)
        if len(matched) / len(prompt) < THRESHOLD:
            holders = tree.get_smallest_tenants()
        chosen = min(holders, key=got.get)
        got[chosen] += 1
        tree.insert(prompt, chosen, time.time())
    return sorted(got.values())


print("ray", ray.__version__)
apart, together = split(""), split(text(400))
print(f"16 groups of 8 prompts of 2,700 characters: {apart[0]} and {apart[1]}")
print(f"the same behind 400 characters in common:    {together[0]} and {together[1]}")
sys.exit(0 if apart[0] >= 48 and together == [0, 128] else 1)
PYTHON
