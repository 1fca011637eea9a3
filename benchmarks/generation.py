"""Speed of generation from one causal trunk: against `model.generate`, CTranslate2, the memory's speed, and itself.

    python -m benchmarks.generation [CHECKPOINT-OR-TRUNK] [--sections throughput,stream,first-token,lookup,choice]
        [--ctranslate2-python PATH] [--texts FILE] [--task NAME] [--json FILE]

The same weights for all (`generate` runs on the very tensors, CTranslate2 on a converted copy), greedy, two threads,
fp32 but where int8 is said. Contestants take turns in every round, the first of which warms up; figures are medians
over rounds, ratios are medians of the ratios within a round. `benchmarks/ctranslate.py` says how to make CTranslate2's
environment; without one its lines are left out.

throughput    tokens a second of several requests at once, each making equally many, as none may end before; ours are
              timed from text to text, the others from token ids to token ids. Tokens equal to those of one-by-one
              `generate` are counted. CTranslate2 gives a batch the prompts' tokens behind the shortest one by one
stream        one request: milliseconds of a decoding step over those of reading its weights once at the memory's speed
first-token   of a stream, from its text on an idle server, over a bare pass over its prompt
lookup        prompt lookup on a task as it was trained, its end token in force
choice        multiple choice with the question encoded once, and with it encoded for every choice
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import GenerationConfig

from benchmarks.ctranslate import PRECISIONS, Peer, peer, write_folder
from benchmarks.measuring import Call, How, Lines, bandwidths, milliseconds, parse, ratio, report, rounds, say, timed
from benchmarks.subject import Subject, open_subject, plain, step_bytes
from mtserve.backends import eager
from mtserve.batching import Batch
from mtserve.engine import Engine
from mtserve.rows import Past
from mtserve.scheduler import Scheduler
from mtserve.trunk import max_length, no_progress_bars

ONE_BY_ONE, PADDED = "generate, one by one", "generate, padded batch"
CHOICES = ["a key", "a fork and a spoon", "the cold water", "nothing at all", "some bread"]


@contextmanager
def scheduled(engine: Engine) -> Iterator[Scheduler]:
    scheduler = Scheduler(engine, timeout_s=3600)
    try:
        yield scheduler
    finally:
        scheduler.close()


@dataclass(frozen=True)
class Contestants:
    """Ways from texts, or from the ids of their tokens, to equally many new tokens for each."""

    subject: Subject
    engine: Engine
    scheduler: Scheduler
    stock: Any
    other: Peer | None
    new_tokens: int

    @property
    def asked(self) -> dict[str, int]:
        return {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens}

    def by_engine(self, texts: Sequence[str]) -> list[Any]:
        works = self.engine.prepare_all(self.subject.task, texts, self.asked)
        self.engine.run(works)
        return [work.state.search.tokens for work in works]

    def by_scheduler(self, texts: Sequence[str]) -> list[Any]:
        async def one(text: str) -> Any:
            deadline = time.monotonic() + self.scheduler.timeout_s
            task = self.subject.task
            works = (await self.scheduler.prepare({task: self.asked}, [text], deadline=deadline))[task]
            await self.scheduler.submit(works, deadline=deadline)
            return works[0].state.search.tokens

        async def every() -> list[Any]:
            return await asyncio.gather(*map(one, texts))

        return asyncio.run(every())

    def by_generate(self, prompts: Sequence[list[int]]) -> list[Any]:
        """One call of `generate`, padded at the left."""
        spec, longest = self.subject.text.spec, max(map(len, prompts))
        config = GenerationConfig(**self.asked, do_sample=False, eos_token_id=spec.eos_id, pad_token_id=spec.pad_id)
        ids = torch.tensor([[spec.pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        made = self.stock.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return [tuple(tokens) for tokens in made[:, longest:].tolist()]

    def calls(self, texts: Sequence[str]) -> dict[str, Call]:
        works = self.engine.prepare_all(self.subject.task, texts, self.asked)
        prompts = [work.rows[0].ids.tolist() for work in works]
        found: dict[str, Call] = {
            "mtserve, engine": lambda: timed(lambda: self.by_engine(texts)),
            "mtserve, scheduler": lambda: timed(lambda: self.by_scheduler(texts)),
            ONE_BY_ONE: lambda: timed(lambda: [self.by_generate([prompt])[0] for prompt in prompts]),
            PADDED: lambda: timed(lambda: self.by_generate(prompts)),
        }
        if (other := self.other) is not None:
            for kind in PRECISIONS:
                found[f"CTranslate2 {kind}"] = partial(other.generate, kind, prompts, self.new_tokens)
        return found


def throughput(subject: Subject, how: How) -> Lines:
    engine, stock = subject.engine(options=plain(new_tokens=how.new_tokens)), subject.stock()
    with compared(subject, how, stock) as other, scheduled(engine) as scheduler:
        contestants = Contestants(subject, engine, scheduler, stock, other, how.new_tokens)
        lines: Lines = []
        for requests in how.requests:
            texts = [how.texts[at % len(how.texts)] for at in range(requests)]
            seconds, made = rounds(how, contestants.calls(texts))
            lines += [
                {
                    "requests": requests,
                    "contestant": name,
                    "tokens/s": requests * how.new_tokens / statistics.median(taken),
                    "x one by one": ratio(seconds[ONE_BY_ONE], taken),
                    "x padded batch": ratio(seconds[PADDED], taken),
                    "equal tokens": equal_share(made[name], made[ONE_BY_ONE]),
                }
                for name, taken in seconds.items()
            ]
    return lines


@contextmanager
def compared(subject: Subject, how: How, stock: Any) -> Iterator[Peer | None]:
    """CTranslate2 with these weights, if its Python was given."""
    if how.ctranslate2 is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as home:
        with no_progress_bars():
            write_folder(Path(home), stock, subject.tokenizer_json, end=subject.text.spec.eos_id or 0)
        with peer(how.ctranslate2, Path(home), threads=how.threads) as (other, versions):
            say(", ".join(f"{name} {number}" for name, number in versions.items()))
            yield other


def equal_share(made: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]) -> float:
    """Share of tokens equal to those at the same place of the truth, of which there are equally many."""
    pairs = [pair for a, b in zip(made, truth, strict=True) for pair in zip(a, b, strict=True)]
    return statistics.mean(a == b for a, b in pairs)


def stream(subject: Subject, how: How) -> Lines:
    engine = subject.engine(options=plain(new_tokens=how.new_tokens))
    asked = {"max_new_tokens": how.new_tokens, "min_new_tokens": how.new_tokens}

    def steps() -> tuple[float, None]:
        """Seconds of a step after the first, which encodes the prompt."""
        _, works = engine.step(engine.prepare_all(subject.task, how.texts[:1], asked))
        started, before = time.perf_counter(), engine.counters.trunk_passes
        while works:
            _, works = engine.step(works)
        return (time.perf_counter() - started) / (engine.counters.trunk_passes - before), None

    ours = statistics.median(rounds(how, {"ours": steps}, times=2)[0]["ours"])
    needed = step_bytes(subject.stock())
    return [
        {
            "memory's speed by": name,
            "GB/s": speed / 1e9,
            "MB a step": needed / 1e6,
            "bound, ms/token": 1e3 * needed / speed,
            "ours, ms/token": 1e3 * ours,
            "profile": engine.backend.profile,
            "% of bound": 100 * needed / speed / ours,
        }
        for name, speed in bandwidths(how.memory_bytes).items()
    ]


def first_token(subject: Subject, how: How) -> Lines:
    lines: Lines = []
    stock, after = subject.stock(), min(8, how.new_tokens)
    most = max_length(subject.model.trunk.config) or sys.maxsize
    for length in (size for size in how.prompts if size + after <= most):
        engine = subject.engine(options=plain(prompt=length, new_tokens=after))
        with scheduled(engine) as scheduler:
            calls = first_token_calls(subject, scheduler, engine, stock, subject.long_text(length))
            seconds, _ = rounds(how, calls, times=4)
        lines.append(
            {
                "prompt tokens": length,
                "first token, ms": milliseconds(seconds["stream"]),
                "our pass, ms": milliseconds(seconds["pass"]),
                "stock forward, ms": milliseconds(seconds["stock"]),
                "x our pass": ratio(seconds["stream"], seconds["pass"]),
                "x stock forward": ratio(seconds["stream"], seconds["stock"]),
            }
        )
    return lines


def first_token_calls(subject: Subject, scheduler: Scheduler, engine: Engine, stock: Any, text: str) -> dict[str, Call]:
    """The stream is read to its end, so that it goes on while its first token is told."""
    (row,) = engine.prepare(subject.task, engine.task(subject.task).kind.parse(text)).rows
    ids = torch.from_numpy(row.ids).long()[None]

    async def streamed() -> tuple[float, None]:
        started, first = time.perf_counter(), 0.0
        asked, until = {subject.task: None}, time.monotonic() + 60
        works = (await scheduler.prepare(asked, [text], deadline=until, stream=True))[subject.task]
        async for _ in scheduler.accept(works, stream=True).events():
            first = first or time.perf_counter() - started
        return first, None

    def forward() -> Any:
        with torch.inference_mode():
            return stock(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax()

    def own_pass() -> Any:
        return engine.backend.run(Batch((replace(row, past=Past()),), {subject.task: (0,)}))

    return {"stream": lambda: asyncio.run(streamed()), "pass": lambda: timed(own_pass), "stock": lambda: timed(forward)}


def lookup(subject: Subject, how: How) -> Lines:
    greedy = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "prompt_lookup_num_tokens": None}
    generation = subject.options.generation.model_copy(update=greedy)
    engine = subject.engine(options=subject.options.model_copy(update={"generation": generation}))

    def answers(guesses: int, at_once: int) -> tuple[list[Any], int]:
        asked, before = {"prompt_lookup_num_tokens": guesses} if guesses else {}, engine.counters.trunk_passes
        works = engine.prepare_all(subject.task, how.texts, asked)
        for start in range(0, len(works), at_once):
            engine.run(works[start : start + at_once])
        return [work.state.search.tokens for work in works], engine.counters.trunk_passes - before

    lines: Lines = []
    for at_once in how.requests[:2]:
        calls = {str(n): lambda n=n, at_once=at_once: timed(lambda: answers(n, at_once)) for n in (0, 4, 8)}
        seconds, made = rounds(how, calls)
        for guesses, taken in seconds.items():
            tokens, passes = made[guesses]
            lines.append(
                {
                    "requests": at_once,
                    "lookup tokens": int(guesses),
                    "tokens": sum(map(len, tokens)),
                    "passes": passes,
                    "tokens/s": sum(map(len, tokens)) / statistics.median(taken),
                    "x without": ratio(seconds["0"], taken),
                    "equal answers": statistics.mean(a == b for a, b in zip(tokens, made["0"][0], strict=True)),
                }
            )
    return lines


def choice(subject: Subject, how: How) -> Lines:
    task = subject.with_head("benchmark.choice", "multiple_choice", max_length=max(how.questions) + 24)
    engine = subject.engine(task)
    lines: Lines = []
    for length in how.questions:
        example: dict[str, Any] = {"question": subject.long_text(length), "choices": CHOICES}

        def scores(worth: int, example: Any = example) -> tuple[float, Any]:
            before = engine.counters.tokens
            with patch.object(eager, "_WORTH_SHARING", worth):
                seconds, (answer,) = timed(lambda: engine.predict(task.name, [example]))
            return seconds, (engine.counters.tokens - before, {entry["index"]: entry["score"] for entry in answer})

        worths = {"once": 1, "each": sys.maxsize}
        calls: dict[str, Call] = {name: partial(scores, worth) for name, worth in worths.items()}
        seconds, made = rounds(how, calls, times=4)
        (few, once), (many, each) = made["once"], made["each"]
        lines.append(
            {
                "choices": len(CHOICES),
                "question tokens": len(subject.text.plain(example["question"])),
                "tokens, once": few,
                "tokens, for each": many,
                "once, ms": milliseconds(seconds["once"]),
                "for each, ms": milliseconds(seconds["each"]),
                "x": ratio(seconds["each"], seconds["once"]),
                "largest difference of scores": max(abs(once[index] - each[index]) for index in once),
            }
        )
    return lines


SECTIONS: dict[str, Callable[[Subject, How], Lines]] = {
    "throughput": throughput,
    "stream": stream,
    "first-token": first_token,
    "lookup": lookup,
    "choice": choice,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--texts", type=Path, help="prompts, one a line")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--ctranslate2-python", help="the Python of an environment with CTranslate2")
    chosen, how = parse(parser, argv)
    how = replace(how, ctranslate2=chosen.ctranslate2_python, rounds=chosen.rounds or how.rounds)
    how = replace(how, new_tokens=chosen.new_tokens or how.new_tokens)
    if chosen.texts:
        lines = chosen.texts.read_text(encoding="utf-8").splitlines()
        how = replace(how, texts=tuple(line for line in lines if line.strip()))
    subject = open_subject(chosen.location, chosen.task)
    wanted = {name: SECTIONS[name] for name in chosen.sections.split(",")}
    report({name: partial(run, subject, how) for name, run in wanted.items()}, into=chosen.json)


if __name__ == "__main__":
    main()
