"""Generation in the engine's steps, against Transformers' own `generate`; batched against alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mtserve.backends.base import Done
from mtserve.engine import Engine
from mtserve.errors import ConfigError, InputError, NotFiniteError
from mtserve.tasks import KINDS
from tests.tiny import EOS, PAD, Tiny, tiny

PROMPTS = ["one", "the parcel arrived two days late", "good bad fine", "what do you open when it starts to rain ?"]
LENGTHS = [" ".join(["north river town good"] * 9)[: 3 + 11 * n].strip() for n in range(12)]
LONG = {"long": ("generation", {"template": "{source} [SEP]{target}", "max_new_tokens": 24, "max_length": 90})}


def stock(small: Tiny, task: str) -> Any:
    model = AutoModelForCausalLM.from_config(small.model.trunk.config).eval()
    getattr(model, model.base_model_prefix).load_state_dict(small.model.trunk.state_dict())
    model.lm_head.weight = torch.nn.Parameter(small.model.head_state(task)["lm_head.weight"].detach())
    return model


def texts(predictions: list[Any]) -> list[str]:
    return [prediction[0]["generated_text"] for prediction in predictions]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 6},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3, "early_stopping": True},
    ],
    ids=["greedy", "penalty", "ngrams", "beams", "best_of_beams"],
)
def test_equals_generate(family: str, asked: dict[str, Any]) -> None:
    small = tiny(family, tasks=LONG)
    model = stock(small, "long")
    works = small.engine.prepare_all("long", PROMPTS, asked)
    prompts = [work.prompt[0].ids for work in works]
    predictions = small.engine.run(works)
    for ids, prediction in zip(prompts, predictions, strict=True):
        whole = model.generate(
            torch.from_numpy(ids)[None].long(),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=EOS,
            pad_token_id=PAD,
            output_scores=True,
            return_dict_in_generate=True,
            **asked,
        )
        theirs = [[int(t) for t in answer[len(ids) :] if int(t) not in (EOS, PAD)] for answer in whole.sequences]
        assert [one["generated_text"] for one in prediction] == [small.text.decode(answer) for answer in theirs]
        if "num_return_sequences" in asked:
            scores = [one["score"] for one in prediction]
            np.testing.assert_allclose(scores, whole.sequences_scores.numpy(), atol=1e-4)
    assert len(set(texts(predictions))) > 1, "the prompts must lead to different answers, or this test shows little"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "asked", [{}, {"do_sample": True, "seed": 7, "temperature": 1.5, "top_k": 20}, {"num_beams": 2}]
)
def test_batched_equals_alone(family: str, asked: dict[str, Any]) -> None:
    """Requests of twelve lengths at once, with classifications beside them, against each alone."""
    small = tiny(family, tasks={**LONG, "topic": ("classification", {"labels": ["good", "bad"], "max_length": 48})})
    together = small.engine.prepare_all("long", LENGTHS, asked) + small.engine.prepare_all("topic", LENGTHS)
    found = small.engine.run(together)[: len(LENGTHS)]
    alone = [small.engine.predict("long", [text], asked)[0] for text in LENGTHS]
    assert texts(found) == texts(alone)
    assert len(set(texts(found))) > 6


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_kept_past_changes_nothing_but_the_cost(family: str) -> None:
    small = tiny(family, tasks=LONG)
    kept = small.engine.predict("long", PROMPTS)
    cheap = small.engine.counters.tokens
    assert small.engine.backend.keeps
    small.engine.backend.__dict__["keeps"] = False
    assert small.engine.predict("long", PROMPTS) == kept
    assert small.engine.counters.tokens - cheap > 5 * cheap


def test_prompt_lookup_is_lossless_and_takes_fewer_passes() -> None:
    """A repetition penalty below 1 makes even a random model say again what it said."""
    small = tiny("llama", tasks=LONG)
    saved = 0
    for text in LENGTHS:
        passes, found = [], []
        for asked in ({}, {"prompt_lookup_num_tokens": 6}):
            before = small.engine.counters.trunk_passes
            found += texts(small.engine.predict("long", [text], {"repetition_penalty": 0.5, **asked}))
            passes.append(small.engine.counters.trunk_passes - before)
        assert found[0] == found[1]
        assert passes[1] <= passes[0]
        saved += passes[0] - passes[1]
    assert saved > 30


def test_n_best_and_stop_strings() -> None:
    small = tiny("gpt2", tasks=LONG)
    (answers,) = small.engine.predict("long", ["the parcel"], {"do_sample": True, "num_return_sequences": 4, "seed": 1})
    assert len(answers) == 4
    assert len({one["generated_text"] for one in answers}) > 1
    assert [one["score"] for one in answers] == sorted((one["score"] for one in answers), reverse=True)
    (whole,) = texts(small.engine.predict("long", ["the parcel"]))
    stop = whole[5:8]
    (answer,) = small.engine.predict("long", ["the parcel"], {"stop_strings": [stop]})
    assert answer[0]["generated_text"] == whole[: whole.index(stop)]
    assert answer[0]["finish_reason"] == "stop_sequence"
    (asked,) = small.engine.predict("long", ["the parcel"], {"output_scores": True})
    assert asked[0]["score"] < 0


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


def test_as_many_run_at_once_as_there_is_room_for() -> None:
    small = tiny("gpt2", tasks=LONG)
    wanted = small.engine.predict("long", LENGTHS)
    backend, most = small.engine.backend, []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(backend, name)

        def launch(self, batch: Any) -> Any:
            most.append(len(batch.rows))
            return backend.launch(batch)

    tight = Engine(small.tasks, Watched(), small.text, max_past_tokens=150)
    assert tight.predict("long", LENGTHS) == wanted
    assert max(most) < 6
    with pytest.raises(InputError, match=r"may take \d+ tokens at once; allowed: 20"):
        Engine(small.tasks, backend, small.text, max_past_tokens=20).predict("long", ["one"])


def test_a_work_whose_logits_are_no_numbers_fails_alone() -> None:
    small = tiny("gpt2", tasks=LONG)
    good, bad = small.engine.prepare_all("long", ["one", "the parcel"])
    (wanted,) = small.engine.predict("long", ["one"])
    backend, spoilt = small.engine.backend, bad.rows[0].key

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(backend, name)

        def launch(self, batch: Any) -> Done:
            answers = {
                task: [
                    np.full_like(logits, np.nan) if batch.rows[row].key == spoilt else logits
                    for row, logits in zip(batch.wanted[task], arrays, strict=True)
                ]
                for task, arrays in backend.run(batch).items()
            }
            return Done(answers)

    engine = Engine(small.tasks, Broken(), small.text)
    finished, unfinished = engine.step([good, bad])
    assert (finished, unfinished) == ([bad], [good])
    with pytest.raises(NotFiniteError):
        engine.finish(bad)
    assert engine.run([good]) == [wanted]


def test_extreme_values_that_are_allowed_give_answers() -> None:
    small = tiny("gpt2", tasks=LONG)
    for asked in ({"temperature": 0.01}, {"temperature": 10}, {"top_p": 1e-9}, {"min_p": 1}):
        assert texts(small.engine.predict("long", ["one"], {"do_sample": True, **asked}))
    for penalty in (0.01, 10):
        assert texts(small.engine.predict("long", ["one"], {"repetition_penalty": penalty}))


def test_the_end_token_ends_and_is_not_shown() -> None:
    small = tiny("gpt2", only=("forth",))
    (work,) = small.engine.prepare_all("forth", ["one"])
    small.engine.run([work])
    first = work.state.search.tokens
    assert len(first) >= 2
    small.text.spec = small.text.spec.model_copy(update={"eos_id": first[1]})
    (again,) = small.engine.prepare_all("forth", ["one"])
    (answer,) = small.engine.run([again])
    assert again.state.search.tokens == first[: first.index(first[1])]
    assert answer[0]["finish_reason"] == "eos_token"


def test_a_template_names_source_answer_and_special_tokens() -> None:
    small = tiny("gpt2", only=("forth",))
    kind = KINDS["generation"]
    options = kind.options.model_validate(
        {"template": "[CLS]{source}[SEP]{target}[UNK]", "max_length": 32, "max_new_tokens": 4}
    )
    labelled = kind.labelled.model_validate({"text": "red [SEP]", "target": "blue"})
    (row,), target = kind.features(labelled, options, small.text)
    words = small.text.literal("[CLS]"), small.text.plain("red [SEP]"), small.text.literal("[SEP]")
    answer = [*small.text.plain("blue"), *small.text.literal("[UNK]")]
    assert row.ids.tolist() == [*words[0], *words[1], *words[2], *answer], (
        "special tokens in the caller's text are text"
    )
    assert small.text.literal("[SEP]")[0] not in words[1]
    assert target[target >= 0].tolist() == answer
    several = options.model_copy(update={"template": "{source}[SEP]{target}[SEP][SEP]"})
    with pytest.raises(ConfigError, match=r"after \{target\} is 2 tokens of this tokenizer; allowed: one"):
        kind.features(labelled, several, small.text)
    for wrong, why in (
        (several, "'forth': template: .* 2 tokens"),
        (options.model_copy(update={"type_id": 999}), "type_id"),
    ):
        with pytest.raises(ConfigError, match=why):
            Engine([replace(small.tasks[0], options=wrong)], small.engine.backend, small.text)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"template": "{source} only"}, "once each"),
        ({"template": "{target}{source}"}, "before"),
        ({"template": "{source}{source}{target}"}, "once each"),
        ({"append": "[CLS]"}, "append is not possible"),
        ({"generation": {"num_beams": 0}}, "greater than or equal to 1"),
    ],
)
def test_options_that_cannot_work(raw: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        KINDS["generation"].options.model_validate(raw)


def test_a_task_has_its_own_way_of_decoding() -> None:
    raw = {**LONG["long"][1], "generation": {"num_beams": 3, "num_return_sequences": 2}}
    small = tiny("gpt2", tasks={**LONG, "beams": ("generation", raw)})
    (answers,) = small.engine.predict("beams", ["one"])
    assert len(answers) == 2
    assert small.engine.predict("beams", ["one"], {"num_beams": 1, "num_return_sequences": 1}) == small.engine.predict(
        "long", ["one"]
    )


def test_parameters_are_bounded_by_the_task() -> None:
    small = tiny("gpt2", only=("forth",))
    for wrong, why in (
        ({"max_new_tokens": 6}, r"parameters.max_new_tokens: 6 is over this task's limit of 5"),
        ({"max_tokens": 1}, r"parameters.max_tokens: not allowed here; allowed: max_new_tokens"),
        ({"temperature": 0.5}, r"parameters.temperature: has no effect without sampling"),
        ({"num_beams": 17}, r"parameters.num_beams: "),
        ({"stop_strings": [""]}, r"parameters.stop_strings"),
        ({"do_sample": True, "temperature": 1e-40}, r"parameters.temperature: .* 0.01"),
        ({"repetition_penalty": 1e-300}, r"parameters.repetition_penalty: .* 0.01"),
    ):
        with pytest.raises(InputError, match=why):
            small.engine.predict("forth", ["one"], wrong)


@pytest.mark.parametrize(
    "asked", [{}, {"prompt_lookup_num_tokens": 4}, {"do_sample": True, "seed": 3}, {"stop_strings": ["qq"]}]
)
def test_what_is_read_along_is_the_answer(asked: dict[str, Any]) -> None:
    small = tiny("gpt2", tasks=LONG)
    for text in PROMPTS:
        work = small.engine.prepare("long", KINDS["generation"].parse(text), asked, stream=True)
        events, unfinished = [], [work]
        while unfinished:
            _, unfinished = small.engine.step(unfinished)
            events += small.engine.emit(work)
        ((answer,),) = small.engine.predict("long", [text], asked)
        assert "".join(event["token"]["text"] for event in events) == answer["generated_text"]
        assert [event["index"] for event in events] == list(range(1, len(events) + 1))
        assert all(event["generated_text"] is None for event in events[:-1])
        assert all(event["token"]["logprob"] <= 0 for event in events)
        assert events[-1]["generated_text"] == answer["generated_text"]
        ended = {"finish_reason": answer["finish_reason"], "generated_tokens": len(events), "seed": asked.get("seed")}
        assert events[-1]["details"] == ended
        ((told,),) = small.engine.predict("long", [text], {**asked, "details": True})
        assert told.pop("details") == {**ended, "prefill": [], "tokens": [event["token"] for event in events]}
        assert told == answer


def test_what_cannot_be_read_along_is_refused() -> None:
    small = tiny("gpt2")
    for task, asked, why in (("forth", {"num_beams": 2}, "several sequences or beams"), ("topic", {}, "comes at once")):
        with pytest.raises(InputError, match=why):
            small.engine.prepare_all(task, ["one"], asked, stream=True)


def test_type_ids_are_those_of_the_options() -> None:
    """The notebook's habit: a segment id of 1 for every token of one task, which GPT-2 looks up among the words."""
    raw = {**LONG["long"][1], "type_id": 1}
    small = tiny("gpt2", tasks={**LONG, "typed": ("generation", raw)})
    typed, plain = (
        small.engine.prepare("typed", KINDS["generation"].parse("one")),
        small.engine.prepare("long", KINDS["generation"].parse("one")),
    )
    small.engine.step([typed, plain])
    ids = torch.from_numpy(typed.prompt[0].ids)[None].long()
    model = stock(small, "long")
    with torch.no_grad():
        theirs = model(ids, token_type_ids=torch.ones_like(ids)).logits[0, -1].numpy()
    np.testing.assert_allclose(typed.logits[0][-1], theirs, atol=1e-4)
    assert np.abs(typed.logits[0] - plain.logits[0]).max() > 1e-2
    whole = model.generate(
        ids, token_type_ids=torch.ones_like(ids), do_sample=False, max_new_tokens=1, pad_token_id=PAD
    )
    assert int(whole[0, -1]) == typed.state.search.tokens[0]


def test_rows_are_featurised_without_a_past() -> None:
    small = tiny("gpt2", tasks=LONG)
    kind, options = KINDS["generation"], small.tasks[0].options
    (row,) = kind.rows(kind.parse("one"), options, small.text)
    assert row.past is None
    (work,) = small.engine.prepare_all("long", ["one"])
    assert work.rows[0].past is not None
    assert replace(work.rows[0], past=None).key == row.key
