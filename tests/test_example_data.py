"""The data of the example: questions whose answers can be checked against the document they are asked about."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

HARBOUR = Path(__file__).parent.parent / "examples" / "harbour"


@pytest.fixture(scope="module")
def document() -> str:
    return (HARBOUR / "document.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def topics() -> list[dict]:
    data = json.loads((HARBOUR / "questions.json").read_text(encoding="utf-8"))
    assert set(data) == {"system", "topics"}
    assert data["system"]
    return data["topics"]


def pairs(topics: list[dict]) -> list[dict]:
    return [pair for topic in topics for pair in topic["examples"] + topic["questions"]]


def test_eight_topics_of_eight_questions_share_two_levels(topics):
    assert [len(topic["questions"]) for topic in topics] == [8] * 8
    assert all(2 <= len(topic["examples"]) <= 3 for topic in topics)
    assert len({topic["name"] for topic in topics}) == 8


def test_every_answer_stands_in_the_document(topics, document):
    missing = [pair for pair in pairs(topics) if pair["answer"].casefold() not in document.casefold()]
    assert not missing


def test_no_question_is_asked_twice(topics):
    questions = [pair["question"].casefold() for pair in pairs(topics)]
    assert len(set(questions)) == len(questions)


def test_examples_do_not_give_away_an_answer_of_their_topic(topics):
    given_away = [
        question
        for topic in topics
        for question in topic["questions"]
        for example in topic["examples"]
        if question["answer"].casefold() in example["answer"].casefold()
    ]
    assert not given_away


def test_the_prefixes_have_the_promised_length(topics, document, smollm2_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert 2800 <= len(tokenizer(document).input_ids) <= 3200
    for topic in topics:
        examples = "\n".join(f"Question: {pair['question']}\nAnswer: {pair['answer']}" for pair in topic["examples"])
        assert 100 <= len(tokenizer(examples).input_ids) <= 200, topic["name"]
