"""What requests may ask of decoding, over what a task says."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from transformers import GenerationConfig

from mtserve.errors import InputError
from mtserve.tasks.decoding import Decoding, GenerationParameters


def resolve(asked: dict[str, Any], defaults: dict[str, Any] | None = None, *, limit: int = 20) -> Decoding:
    return GenerationParameters(**asked).resolve(GenerationParameters(**(defaults or {})), limit=limit)


def test_names_are_those_of_transformers() -> None:
    theirs = set(GenerationConfig().to_dict()) | {"stop_strings", "prompt_lookup_num_tokens"}
    assert set(GenerationParameters.model_fields) - theirs == {"details", "seed"}
    assert all(field.description for field in GenerationParameters.model_fields.values())
    assert set(GenerationParameters.model_fields) == set(Decoding.__dataclass_fields__)


def test_the_request_goes_over_the_task_and_the_task_over_nothing() -> None:
    assert resolve({}) == Decoding(max_new_tokens=20)
    assert resolve({}, {"max_new_tokens": 9, "num_beams": 3}) == Decoding(max_new_tokens=9, num_beams=3)
    assert resolve({"num_beams": 2}, {"num_beams": 3}).num_beams == 2
    assert resolve({}, {"max_new_tokens": 30}).max_new_tokens == 20
    assert resolve({"num_beams": 3, "num_return_sequences": 2}).sequences == 3
    assert resolve({"do_sample": True, "num_return_sequences": 4}).sequences == 4


@pytest.mark.parametrize(
    ("asked", "defaults", "found"),
    [
        ({"do_sample": False}, {"do_sample": True, "temperature": 0.5, "num_return_sequences": 3}, {"sequences": 1}),
        ({"do_sample": True}, {"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 1, "num_return_sequences": 2}),
        ({"num_beams": 4}, {"do_sample": True, "seed": 3}, {"do_sample": False, "num_beams": 4}),
        ({"num_beams": 2}, {"num_beams": 4, "num_return_sequences": 4}, {"num_return_sequences": 2}),
        ({"num_beams": 2}, {"prompt_lookup_num_tokens": 4}, {"prompt_lookup_num_tokens": None}),
        ({}, {"prompt_lookup_num_tokens": 4, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 4}),
        ({"max_new_tokens": 3}, {"min_new_tokens": 5}, {"min_new_tokens": 3}),
        ({"num_beams": 1}, {"length_penalty": 2.0}, {"num_beams": 1}),
    ],
)
def test_defaults_that_do_not_apply_are_unused(
    asked: dict[str, Any], defaults: dict[str, Any], found: dict[str, Any]
) -> None:
    resolved = resolve(asked, defaults)
    assert {name: getattr(resolved, name) for name in found} == found


@pytest.mark.parametrize(
    ("asked", "defaults", "message"),
    [
        ({"max_new_tokens": 21}, {}, "parameters.max_new_tokens: 21 is over this task's limit of 20"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, {}, "parameters.min_new_tokens: 9 is over max_new_tokens, which"),
        ({"temperature": 0.5}, {}, "parameters.temperature: has no effect without sampling; set do_sample to true"),
        ({"seed": 1, "do_sample": False}, {"do_sample": True}, "parameters.seed: has no effect without sampling"),
        ({"num_return_sequences": 3}, {}, "parameters.num_return_sequences: 3 answers need do_sample, or num_beams of"),
        ({"num_return_sequences": 3, "num_beams": 2}, {}, "at least 3 (it is 2)"),
        ({"length_penalty": 2}, {}, "parameters.length_penalty: has no effect without beams; set num_beams to 2"),
        ({"early_stopping": True, "do_sample": True}, {"num_beams": 4}, "parameters.early_stopping: has no effect"),
        ({"num_beams": 2, "do_sample": True}, {}, "parameters.num_beams: 2 beams with do_sample are not supported"),
        ({"prompt_lookup_num_tokens": 4, "num_beams": 2}, {}, "parameters.prompt_lookup_num_tokens: is for one greedy"),
        (
            {"prompt_lookup_num_tokens": 4},
            {"do_sample": True},
            "parameters.prompt_lookup_num_tokens: is for one greedy",
        ),
        ({"prompt_lookup_num_tokens": 4}, {"num_beams": 2}, "parameters.prompt_lookup_num_tokens: is for one greedy"),
    ],
)
def test_what_does_not_go_together_is_refused(asked: dict[str, Any], defaults: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(asked, defaults)
    assert message in str(caught.value)


def test_every_problem_is_named() -> None:
    with pytest.raises(InputError) as caught:
        resolve({"max_new_tokens": 99, "temperature": 2, "top_k": 1, "seed": 0, "num_return_sequences": 2})
    names = [problem.field for problem in caught.value.problems]
    assert names == [
        f"parameters.{name}" for name in ("max_new_tokens", "temperature", "top_k", "seed", "num_return_sequences")
    ]


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"min_new_tokens": -1},
        {"temperature": 0},
        {"temperature": 10.1},
        {"temperature": float("nan")},
        {"length_penalty": float("inf")},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"no_repeat_ngram_size": 0},
        {"num_beams": 17},
        {"num_return_sequences": 17},
        {"stop_strings": []},
        {"stop_strings": [""]},
        {"stop_strings": ["a" * 65]},
        {"stop_strings": ["a"] * 9},
        {"prompt_lookup_num_tokens": 33},
        {"seed": 2**32},
        {"num_beam": 2},
    ],
)
def test_values_out_of_bounds(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        GenerationParameters(**bad)


def test_names_of_text_generation_inference() -> None:
    """What its clients send with every request asks for nothing, and `stop` is `stop_strings`."""
    sent = {"stop": ["x"], "details": True, "decoder_input_details": False, "watermark": None, "best_of": None}
    made = GenerationParameters.model_validate(sent)
    assert made.stop_strings == ("x",)
    assert made.details is True
    assert GenerationParameters.model_validate({"stop": []}).stop_strings is None
    for wrong in ({"watermark": True}, {"best_of": 2}, {"stop": ["x"], "stop_strings": ["y"]}, {"other": None}):
        with pytest.raises(ValidationError, match="not permitted"):
            GenerationParameters.model_validate(wrong)
    with pytest.raises(InputError, match="details: are of a single answer; 2 sequences"):
        resolve({"details": True, "num_beams": 2})
    assert not resolve({"num_beams": 2}, {"details": True}).details
