"""Greedy generation in the engine's steps, against Transformers' own `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mtserve.errors import InputError
from tests.tiny import EOS, PAD, Tiny, tiny

PROMPTS = ["one", "the parcel arrived two days late", "good bad fine", "what do you open when it starts to rain ?"]


def stock(small: Tiny) -> Any:
    model = AutoModelForCausalLM.from_config(small.model.trunk.config).eval()
    getattr(model, model.base_model_prefix).load_state_dict(small.model.trunk.state_dict())
    model.lm_head.weight = torch.nn.Parameter(small.model.head_state("forth")["lm_head.weight"].detach())
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equals_greedy_generate(family: str) -> None:
    small = tiny(family, only=("forth",))
    model = stock(small)
    works = small.engine.prepare_all("forth", PROMPTS)
    predictions = small.engine.run(works)
    made = []
    for work, prediction in zip(works, predictions, strict=True):
        ids = torch.from_numpy(work.prompt[0].ids)[None].long()
        whole = model.generate(ids, do_sample=False, max_new_tokens=5, eos_token_id=EOS, pad_token_id=PAD)[0]
        theirs = [int(t) for t in whole[ids.shape[1] :] if int(t) != EOS]
        assert work.generated == theirs
        assert prediction[0]["generated_text"] == small.text.decode(theirs)
        made.append(tuple(theirs))
    assert len(set(made)) > 1, "the prompts must lead to different answers, or this test shows little"


def test_finished_works_leave_and_others_join_between_steps() -> None:
    small = tiny("gpt2")
    first = small.engine.prepare_all("back", ["one"], {"max_new_tokens": 4})
    late = small.engine.prepare_all("topic", ["good"]) + small.engine.prepare_all(
        "forth", ["two"], {"max_new_tokens": 1}
    )
    _, unfinished = small.engine.step(first)
    assert unfinished == first
    finished, unfinished = small.engine.step(unfinished + late)
    assert finished == late
    assert unfinished == first
    alone = small.engine.predict("back", ["one"], {"max_new_tokens": 4})
    assert small.engine.run(unfinished) == alone


def test_the_end_token_ends_and_is_not_shown() -> None:
    small = tiny("gpt2", only=("forth",))
    first = small.engine.prepare_all("forth", ["one"])
    small.engine.run(first)
    assert len(first[0].generated) >= 2
    small.text.spec = small.text.spec.model_copy(update={"eos_id": first[0].generated[1]})
    again = small.engine.prepare_all("forth", ["one"])
    small.engine.run(again)
    assert again[0].generated == first[0].generated[: first[0].generated.index(first[0].generated[1])]


def test_parameters_are_bounded_by_the_task() -> None:
    small = tiny("gpt2", only=("forth",))
    with pytest.raises(InputError, match=r"parameters.max_new_tokens: 6 is over this task's limit of 5"):
        small.engine.predict("forth", ["one"], {"max_new_tokens": 6})
    with pytest.raises(InputError, match=r"parameters.temperature: not allowed here; allowed: max_new_tokens"):
        small.engine.predict("forth", ["one"], {"temperature": 1})
