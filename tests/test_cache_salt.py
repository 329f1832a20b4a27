"""A salt keeps keys and values to itself: in the tree, in the engine, under pressure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer import LLM, SamplingParams
from gossamer.errors import InvalidPromptError
from test_prefix_tree import fill, new_tree

PROMPT = "Between the house and the river there was a wall, and in the wall a door"
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def salted(salt: str | None, prompt: str = PROMPT) -> dict[str, Any]:
    return {"prompt": prompt, "cache_salt": salt}


@given(st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.lists(st.integers(0, 2), min_size=1, max_size=6))))
def test_each_salt_has_a_tree_of_its_own(inserted: list[tuple[str | None, list[int]]]) -> None:
    tree, alone = new_tree(1000), {salt: new_tree(1000) for salt in (None, "a", "b")}
    for salt, tokens in inserted:
        node = tree.insert(tokens, salt)
        tree.lock(node)
        for each in node.path():
            assert tree.allocate(each)
            each.computed = len(each)
        fill(alone[salt], tuple(tokens))
    for _, tokens in inserted:
        for other, own in alone.items():
            assert tree.match(tokens, other) == own.match(tokens)
    assert tree.num_bytes == sum(own.num_bytes for own in alone.values()) == tree.budget.used


def test_nothing_is_left_of_a_salt_that_is_evicted() -> None:
    tree = new_tree(1000)
    for salt in ("a", "b", None):
        node = tree.insert([1, 2, 3], salt)
        tree.lock(node)
        assert tree.allocate(node)
        node.computed = 3
        tree.unlock(node)
    assert set(tree.roots) == {None, "a", "b"}
    tree.evict(tree.budget.total)
    assert set(tree.roots) == {None} and tree.budget.used == 0 and not list(tree)


def test_pins_belong_to_their_salt() -> None:
    tree = new_tree(1000)
    tree.pin([1, 2], "a")
    node = tree.insert([1, 2])
    assert node.pins == 0 and tree.insert([1, 2], "a").pins == 1
    tree.unpin([1, 2], "a")
    assert tree.insert([1, 2], "a").pins == 0


@pytest.mark.parametrize("sharing", ["attention", "storage"])
def test_prompts_share_within_a_salt_only_and_answers_do_not_change(tiny: Path, sharing: Any) -> None:
    llm = LLM(tiny, sharing=sharing)
    (plain,) = LLM(tiny, sharing="off").generate(PROMPT, GREEDY)
    together = llm.generate([salted(None), salted("a"), salted("b"), salted("a")], GREEDY)
    assert [output.num_cached_tokens > 0 for output in together].count(True) == 1  # the second of "a"
    later = llm.generate([salted("c"), salted("a"), salted("b"), PROMPT], GREEDY)
    assert [output.num_cached_tokens > 0 for output in later] == [False, True, True, True]
    assert all(o.outputs[0].token_ids == plain.outputs[0].token_ids for o in together + later)


def test_many_salts_under_little_memory(tiny: Path) -> None:
    llm = LLM(tiny, memory=400 * 2 * 2 * 2 * 8 * 4)
    prompts = [salted(str(i % 7), f"{PROMPT} {i % 3}") for i in range(40)]
    outputs = llm.generate(prompts, GREEDY)
    (expected,) = LLM(tiny, sharing="off").generate(f"{PROMPT} 0", GREEDY)
    assert outputs[0].outputs[0].token_ids == outputs[21].outputs[0].token_ids == expected.outputs[0].token_ids
    assert len(llm.engine.tree.roots) <= 8


@pytest.mark.parametrize("salt", ["", 5, ["a"]])
def test_a_salt_is_a_string(tiny: Path, llm: LLM, salt: Any) -> None:
    with pytest.raises(InvalidPromptError, match="cache_salt"):
        llm.generate(salted(salt), GREEDY)
