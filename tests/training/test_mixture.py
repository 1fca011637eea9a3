"""The invariants of every mixture, for any sizes, and each strategy's own shares."""

from __future__ import annotations

import math
import random
from itertools import chain
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mtserve.errors import ConfigError
from training.trainer.mixture import MixtureConfig, Schedule, Strategy, apportioned

ONCE = ("proportional", "round_robin")
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {} for name in get_args(Strategy)},
    "weights": {"weights": {"a": 0.5, "b.c": 3, "d": 100}},
    "temperature": {"temperature": 2, "cap": 20},
    "staged": {"stages": [{"a": 1, "b.c": 2, "d": 1}, {"a": 2, "b.c": 1, "d": 5}]},
}


def schedule(
    sizes: dict[str, int],
    batch_sizes: dict[str, int] | int,
    strategy: str,
    *,
    seed: int = 0,
    epochs: float = 3,
    lengths: dict[str, list[int]] | None = None,
) -> Schedule:
    """A schedule of a strategy with the settings of `CONFIGS`, weights only of the tasks that there are; grouped by
    length where there are lengths."""
    raw = {"strategy": strategy, "group_by_length": lengths is not None, **CONFIGS[strategy]}
    if strategy == "weights":
        raw["weights"] = {task: raw["weights"][task] for task in sizes}
    if strategy == "staged":
        raw["stages"] = [{task: stage[task] for task in sizes} for stage in raw["stages"]]
    if isinstance(batch_sizes, int):
        batch_sizes = dict.fromkeys(sizes, batch_sizes)
    config = MixtureConfig.model_validate(raw)
    return Schedule(sizes, batch_sizes, config, seed=seed, epochs=epochs, lengths=lengths)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    tasks = draw(
        st.dictionaries(
            st.sampled_from(["a", "b.c", "d"]), st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1
        )
    )
    sizes, batch_sizes = {t: s for t, (s, _) in tasks.items()}, {t: b for t, (_, b) in tasks.items()}
    strategy, seed = draw(st.sampled_from(list(CONFIGS))), draw(st.integers(0, 9))
    lengths = {t: [(at * 37 + 11) % 29 for at in range(size)] for t, size in sizes.items()}
    epochs, grouped = draw(st.sampled_from([0.5, 1, 3, 4.5])), draw(st.booleans())
    return schedule(sizes, batch_sizes, strategy, seed=seed, epochs=epochs, lengths=lengths if grouped else None)


@given(mixture=schedules(), number=st.integers(0, 6))
def test_an_epoch_is_what_the_schedule_says_of_it(mixture: Schedule, number: int) -> None:
    batches = mixture.epoch(number)
    assert len(batches) == len(mixture) == sum(math.ceil(n / mixture.batch_sizes[t]) for t, n in mixture.sizes.items())
    for task in mixture.sizes:
        mine = [indexes for name, indexes in batches if name == task]
        assert len(mine) == mixture.counts(number)[task] >= 1
        assert sum(map(len, mine)) == mixture.examples(number)[task]
        assert all(1 <= len(batch) <= mixture.batch_sizes[task] for batch in mine)


@given(mixture=schedules(), numbers=st.lists(st.integers(0, 6), max_size=4))
def test_an_epoch_follows_from_seed_and_number_alone(mixture: Schedule, numbers: list[int]) -> None:
    before = [mixture.epoch(number) for number in numbers]
    again = Schedule(
        mixture.sizes,
        mixture.batch_sizes,
        mixture.config,
        seed=mixture.seed,
        epochs=mixture.epochs,
        lengths=mixture._lengths,
    )
    for number, batches in reversed(list(zip(numbers, before, strict=True))):
        assert again.epoch(number) == batches


@given(mixture=schedules(), epochs=st.integers(1, 6))
def test_nothing_is_lost_and_nothing_comes_again_before_its_pass_is_over(mixture: Schedule, epochs: int) -> None:
    batches = [batch for number in range(epochs) for batch in mixture.epoch(number)]
    for task, size in mixture.sizes.items():
        mine = [indexes for name, indexes in batches if name == task]
        a_pass = math.ceil(size / mixture.batch_sizes[task])
        for start in range(0, len(mine), a_pass):
            found = list(chain.from_iterable(mine[start : start + a_pass]))
            assert len(set(found)) == len(found)
            if start + a_pass <= len(mine):
                assert sorted(found) == list(range(size))
                short = [batch for batch in mine[start : start + a_pass] if len(batch) < mixture.batch_sizes[task]]
                assert len(short) == (size % mixture.batch_sizes[task] > 0)
        if mixture.config.strategy in ONCE:
            assert len(mine) == epochs * a_pass


@pytest.mark.parametrize("strategy", list(CONFIGS))
def test_order_changes_with_seed_and_epoch(strategy: str) -> None:
    orders = [
        schedule({"a": 40, "d": 40}, 4, strategy, seed=seed).epoch(number) for seed in (0, 1) for number in (0, 1)
    ]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_order_is_the_same_in_every_version() -> None:
    sizes = {"a": 3, "b.c": 2}
    assert schedule(sizes, 2, "proportional").epoch(0) == [("a", [0, 2]), ("b.c", [0, 1]), ("a", [1])]
    assert schedule(sizes, 2, "round_robin").epoch(0) == [("a", [0, 2]), ("b.c", [0, 1]), ("a", [1])]
    assert schedule(sizes, 1, "uniform").epoch(2) == [("b.c", [0]), ("a", [0]), ("b.c", [1]), ("a", [1]), ("a", [2])]


def test_tasks_take_turns_until_they_run_out() -> None:
    batches = schedule({"a": 5, "b.c": 2, "d": 9}, {"a": 2, "b.c": 2, "d": 2}, "round_robin").epoch(4)
    assert [task for task, _ in batches] == ["a", "b.c", "d", "a", "d", "a", "d", "d", "d"]


def test_uniform_walks_through_a_large_task_over_the_epochs() -> None:
    mixture = schedule({"a": 90, "d": 10}, 1, "uniform")
    assert mixture.counts(0) == mixture.counts(7) == {"a": 50, "d": 50}
    seen = [index for number in range(9) for task, (index,) in mixture.epoch(number) if task == "a"]
    assert sorted(seen) == sorted([*range(90)] * 5)


def test_weights_are_shares_of_batches() -> None:
    config = MixtureConfig(strategy="weights", weights={"d": 1, "a": 5})
    assert Schedule({"a": 40, "d": 40}, {"a": 2, "d": 1}, config, seed=0, epochs=1).counts(0) == {"a": 50, "d": 10}


@pytest.mark.parametrize(("temperature", "cap"), [(1, None), (1, 900), (2, None), (2, 900), (1e9, None)])
def test_temperature_follows_its_formula(temperature: float, cap: int | None) -> None:
    sizes = {"a": 8000, "b": 400, "c": 1600}
    config = MixtureConfig(strategy="temperature", temperature=temperature, cap=cap)
    mixture = Schedule(sizes, dict.fromkeys(sizes, 10), config, seed=0, epochs=1)
    rates = {task: min(size, cap or size) ** (1 / temperature) for task, size in sizes.items()}
    for task, count in mixture.counts(0).items():
        assert count == pytest.approx(1000 * rates[task] / sum(rates.values()), abs=1)


def test_temperature_one_is_proportional_whatever_the_batch_sizes() -> None:
    sizes, batch_sizes = {"a": 600, "b": 300}, {"a": 6, "b": 1}
    config = MixtureConfig(strategy="temperature", temperature=1)
    assert Schedule(sizes, batch_sizes, config, seed=0, epochs=1).counts(0) == {"a": 100, "b": 300}


def test_annealing_goes_from_proportional_to_nearly_uniform() -> None:
    mixture = schedule({"a": 900, "d": 100}, 1, "annealed", epochs=4.5)
    for number in range(5):
        alpha = 1 - 0.8 * number / 4
        share = 900**alpha / (900**alpha + 100**alpha)
        assert mixture.counts(number)["a"] == pytest.approx(1000 * share, abs=1)
    assert mixture.counts(0) == {"a": 900, "d": 100}
    assert mixture.counts(9) == mixture.counts(4)
    assert schedule({"a": 900, "d": 100}, 1, "annealed", epochs=1).counts(0) == {"a": 900, "d": 100}


def test_a_task_may_begin_late() -> None:
    config = MixtureConfig(strategy="staged", stages=[{"a": 1, "d": 0}, {"a": 1, "d": 0}, {"a": 3, "d": 1}])
    mixture = Schedule({"a": 60, "d": 20}, {"a": 1, "d": 1}, config, seed=0, epochs=3)
    assert [mixture.counts(at) for at in range(4)] == [*[{"a": 80, "d": 0}] * 2, *[{"a": 60, "d": 20}] * 2]
    seen = [[index for task, (index,) in mixture.epoch(at) if task == "d"] for at in range(3)]
    assert seen[:2] == [[], []]
    assert sorted(seen[2]) == [*range(20)]
    halves = Schedule({"a": 60, "d": 20}, {"a": 1, "d": 1}, config, seed=0, epochs=6)
    assert [halves.counts(at)["d"] for at in range(6)] == [0, 0, 0, 0, 20, 20]
    assert len(Schedule({"a": 60, "d": 20}, {"a": 1, "d": 1}, config, seed=0, epochs=1).epoch(0)) == 80


@given(shares=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), extra=st.integers(0, 200))
def test_apportionment_is_exact(shares: list[float], extra: int) -> None:
    named = {str(at): share for at, share in enumerate(shares)}
    total = len(shares) + extra
    counts = apportioned(total, named)
    assert list(counts) == list(named)
    assert sum(counts.values()) == total
    assert min(counts.values()) >= 1
    assert all(counts[a] >= counts[b] for a in named for b in named if named[a] > named[b])
    quotas = {task: total * share / sum(shares) for task, share in named.items()}
    if min(quotas.values()) >= 1:
        assert all(abs(counts[task] - quotas[task]) < 1 + 1e-9 for task in named)


def test_apportionment_by_hand() -> None:
    assert apportioned(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert apportioned(10, {"a": 416, "b": 338, "c": 246}) == {"a": 4, "b": 3, "c": 3}
    assert apportioned(7, {"a": 6, "b": 0.9, "c": 0.1}) == {"a": 5, "b": 1, "c": 1}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("alphabetical", "'proportional', 'round_robin'"),
        ({"strategy": "weights"}, "strategy 'weights' needs weights"),
        ({"strategy": "temperature", "cap": 9}, "strategy 'temperature' needs temperature"),
        ({"weights": {"a": 1}}, "weights is for strategy 'weights'; the strategy is 'proportional'"),
        ({"strategy": "uniform", "temperature": 2}, "temperature is for strategy 'temperature'"),
        ({"strategy": "annealed", "cap": 2}, "cap is for strategy 'temperature'; the strategy is 'annealed'"),
        ({"strategy": "weights", "weights": {"a": 0}}, "greater than 0"),
        ({"strategy": "staged"}, "strategy 'staged' needs stages"),
        ({"strategy": "staged", "stages": [{"a": 1}, {"a": 0}]}, "stages: number 1 has no task with a weight above 0"),
        ({"strategy": "staged", "stages": [{"a": 1, "b": 0}]}, "stages: task b has no weight above 0 in any"),
        ({"strategy": "temperature", "temperature": 0.5}, "greater than or equal to 1"),
        ({"temprature": 2}, "unknown key 'temprature'; allowed: strategy, weights, temperature, cap"),
    ],
)
def test_configs_that_make_no_sense(raw: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MixtureConfig.model_validate(raw)


@pytest.mark.parametrize("strategy", list(CONFIGS))
def test_a_config_survives_its_own_dump(strategy: str) -> None:
    config = MixtureConfig.model_validate({"strategy": strategy, **CONFIGS[strategy]})
    assert MixtureConfig.model_validate(config.model_dump(mode="json")) == config
    assert CONFIGS[strategy] or MixtureConfig.model_validate(strategy) == config


def test_schedules_that_cannot_be() -> None:
    config = MixtureConfig(strategy="weights", weights={"a": 1, "x": 1})
    with pytest.raises(ConfigError, match=r"mixture\.weights names unknown x; the tasks are a, b"):
        Schedule({"a": 1, "b": 1}, {"a": 1, "b": 1}, config, seed=0, epochs=1)
    with pytest.raises(ConfigError, match=r"mixture\.weights lacks b, c; the tasks are a, x, b, c"):
        config.check(["a", "x", "b", "c"])
    staged = MixtureConfig(strategy="staged", stages=[{"a": 1, "b": 1}, {"a": 1}])
    with pytest.raises(ConfigError, match=r"mixture\.stages\.1 lacks b; the tasks are a, b"):
        staged.check(["a", "b"])
    with pytest.raises(ConfigError, match="tasks with examples; b has none"):
        schedule({"a": 1, "b": 0}, 1, "uniform")
    with pytest.raises(ConfigError, match="tasks with batch size; b has none"):
        schedule({"a": 1, "b": 1}, {"a": 1}, "uniform")
    with pytest.raises(ConfigError, match="no task has none"):
        schedule({}, 1, "uniform")


def test_batches_of_similar_lengths_hold_little_padding_and_still_differ_between_epochs() -> None:
    size, draw = 5000, random.Random(0)
    lengths = [max(3, int(draw.lognormvariate(3, 0.7))) for _ in range(size)]
    padding = []
    for grouped in (None, {"a": lengths}):
        mixture = schedule({"a": size}, 16, "proportional", lengths=grouped)
        batches = [indexes for _, indexes in mixture.epoch(0)]
        taken = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
        padding.append(1 - sum(lengths) / taken)
        assert [indexes for _, indexes in mixture.epoch(1)] != batches
    assert padding[0] > 0.5
    assert padding[1] < 0.15
    first = [lengths[batch[0]] for batch in batches[:50]]
    assert first != sorted(first), "long and short batches come in any order"
