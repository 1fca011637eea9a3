"""Tuning: what a flip is, intervals worked out by hand, verdicts, what is recorded, and the command."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtserve import comparison, loading, speeds, tuning
from mtserve.backends import hardware, machine
from mtserve.backends.base import Done
from mtserve.batching import Batch
from mtserve.checkpoint import Checkpoint
from mtserve.comparison import Answered, Cases, changed, difference
from mtserve.decisions import flipped
from mtserve.engine import Engine, Task
from mtserve.errors import CheckpointError, ConfigError
from mtserve.loading import load_checkpoint
from mtserve.manifest import FP32, Change, Profile, Speed
from mtserve.profiles import Hardware
from mtserve.sealing import accept_profiles
from mtserve.tasks import KINDS
from tests.labelled import write_labelled
from tests.tiny import tiny


def options(kind: str, **given: Any) -> Any:
    return KINDS[kind].options.model_validate(given)


TOPIC = options("classification", labels=["a", "b", "c"])
TAGS = options("classification", labels=["a", "b"], multi_label=True)
SCORE = options("similarity", low=0, high=5)
CHOICE = options("multiple_choice")
NAMES = options("token_classification", labels=["person", "place"])
FORTH = options("generation", max_new_tokens=4)


def labels(**scores: float) -> list[dict[str, Any]]:
    return [{"label": name, "score": score} for name, score in sorted(scores.items(), key=lambda one: -one[1])]


def span(start: int, end: int, label: str, score: float = 0.9) -> dict[str, Any]:
    return {"start": start, "end": end, "entity_group": label, "word": "x", "score": score}


def text(said: str, finish: str = "eos_token", **more: Any) -> list[dict[str, Any]]:
    return [{"generated_text": said, "translation_text": said, "finish_reason": finish, **more}]


def choices(*order: int) -> list[dict[str, Any]]:
    return [{"index": at, "choice": str(at), "score": 1 / (place + 2)} for place, at in enumerate(order)]


@pytest.mark.parametrize(
    ("of", "one", "other", "flips"),
    [
        (TOPIC, labels(a=0.5, b=0.3, c=0.2), labels(a=0.4, c=0.35, b=0.25), False),  # the best stays the best
        (TOPIC, labels(a=0.5, b=0.3, c=0.2), labels(b=0.5, a=0.3, c=0.2), True),
        (TAGS, labels(a=0.51, b=0.1), labels(a=0.95, b=0.4), False),  # both on the sides where they were
        (TAGS, labels(a=0.51, b=0.1), labels(a=0.49, b=0.1), True),
        (TAGS, labels(a=0.9, b=0.6), labels(b=0.9, a=0.6), False),  # the same set
        (SCORE, {"score": 2.0}, {"score": 2.05}, False),  # 1 % of 5
        (SCORE, {"score": 2.0}, {"score": 2.051}, True),
        (SCORE, {"score": 2.0}, {"score": float("nan")}, True),
        (CHOICE, choices(2, 0, 1), choices(2, 1, 0), False),
        (CHOICE, choices(2, 0, 1), choices(0, 2, 1), True),
        (NAMES, [span(0, 3, "person", 0.9)], [span(0, 3, "person", 0.6)], False),
        (NAMES, [span(0, 3, "person")], [span(0, 4, "person")], True),
        (NAMES, [span(0, 3, "person")], [span(0, 3, "place")], True),
        (NAMES, [span(0, 3, "person")], [], True),
        (NAMES, [], [], False),
        (FORTH, text("ay", score=-1.0), text("ay", score=-1.2), False),
        (FORTH, text("ay"), text("aye"), True),
        (FORTH, text("ay"), text("ay", "length"), True),
    ],
)
def test_what_a_flip_is(of: Any, one: Any, other: Any, flips: bool) -> None:
    assert flipped(one, other, of) is flips
    assert flipped(other, one, of) is flips
    assert flipped(one, one, of) is False


# intervals


def answered(truths: Sequence[str], given: Sequence[str], logits: Sequence[Sequence[float]] = ()) -> Answered:
    """A task's answers, of two labels."""
    task = Task("t", KINDS["classification"], options("classification", labels=["a", "b"]))
    labelled = [task.kind.labelled(text="x", label=truth) for truth in truths]
    predictions = [labels(**{name: 0.9, "b" if name == "a" else "a": 0.1}) for name in given]
    arrays = [[np.array(row, np.float32)] for row in logits] or [[] for _ in truths]
    return Answered(Cases(task, labelled, [task.kind.unlabelled(one) for one in labelled]), predictions, arrays)


def test_a_change_is_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 rows, all right in fp32, the profile has 20 wrong: accuracy falls by 0.2. The change of a resample is
    binomial, -B(100, 0.2) / 100, whose middle 95 % are from -0.28 to -0.12 (exact quantiles: 12 and 28)."""
    monkeypatch.setattr(type(KINDS["classification"]), "metric", "accuracy")
    monkeypatch.setattr(comparison, "RESAMPLES", 200)
    truths = ["a", "b"] * 50
    given = ["b" if truth == "a" else "a" for truth in truths[:20]] + list(truths[20:])
    found = changed(answered(truths, truths), answered(truths, given))
    assert (found.fp32, found.change, found.flips, found.rows) == (1.0, pytest.approx(-0.2), 20, 100)
    assert (found.low, found.high) == (pytest.approx(-0.28, abs=0.025), pytest.approx(-0.12, abs=0.025))


def test_the_interval_is_paired() -> None:
    """Many rows are wrong, but the same ones: nothing changed, though each metric alone is uncertain."""
    truths, given = ["a", "b"] * 20, ["a", "a"] * 20
    found = changed(answered(truths, given), answered(truths, given))
    assert (found.change, found.low, found.high, found.flips) == (0, 0, 0, 0)


def test_differences_are_those_of_golden_rows() -> None:
    fp32 = answered(["a", "b"], ["a", "b"], [[0.5, 0.25], [4.0, -8.0]])
    other = answered(["a", "b"], ["a", "b"], [[0.5, 0.75], [4.0, -7.0]])
    assert difference(fp32, other) == 0.5  # 0.5 / 1 and 1 / 8
    broken = answered(["a", "b"], ["a", "b"], [[0.5, float("nan")], [4.0, -8.0]])
    assert difference(fp32, broken) == float("inf")


# verdicts


def change(*, flips: int = 0, rows: int = 200, low: float = 0.0, high: float = 0.0) -> Change:
    return Change(metric="accuracy", fp32=0.9, change=(low + high) / 2, low=low, high=high, flips=flips, rows=rows)


def verdict(tasks: dict[str, Change], *, worst: float = 0.01, missing: Sequence[str] = ()) -> tuning.Verdict:
    return tuning.judge("bf16", tasks, worst=worst, missing=missing, max_flips=0.005, speed=100.0)


@pytest.mark.parametrize(
    ("tasks", "accepted", "reason"),
    [
        ({"a": change(flips=1), "b": change()}, True, ""),  # 1 of 400
        ({"a": change(flips=2), "b": change()}, True, ""),  # just 0.5 %
        ({"a": change(flips=2), "b": change(flips=1)}, False, "0.75% flips, at most 0.50% allowed"),
        ({"a": change(low=-0.02, high=0.0)}, True, ""),  # not all below 0
        ({"a": change(low=-0.02, high=-0.01)}, False, "a: accuracy falls by 0.0150"),
        ({"a": change(low=0.01, high=0.02)}, True, ""),  # better is no loss
    ],
)
def test_verdicts(tasks: dict[str, Change], accepted: bool, reason: str) -> None:
    found = verdict(tasks)
    assert (found.accepted, found.reason) == (accepted, reason)


def test_without_rows_or_with_logits_that_are_none_nothing_is_accepted() -> None:
    assert verdict({}, missing=["a", "b"]).reason == "no calibration rows of a, b"
    assert verdict({"a": change()}, missing=["b"]).accepted is False
    assert verdict({}, worst=float("inf")).reason == "its logits are not finite"
    assert tuning.judge("fp32", {}, worst=0, missing=["a"], max_flips=0, speed=1).accepted


def test_a_tolerance_is_twice_what_was_seen_and_no_less_than_that_of_fp32() -> None:
    assert verdict({"a": change()}, worst=0.0123).tolerance == 0.025
    assert verdict({"a": change()}, worst=1e-6).tolerance == FP32.tolerance


def test_bounds_on_the_share_of_flips() -> None:
    """None of n: 1 - 0.05 ** (1 / n), about 3 / n. Of 10 with 1: where 1 or fewer come up 5 % of the time."""
    assert tuning.upper_bound(0, 1000) == pytest.approx(0.0029912, abs=1e-6)
    bound = tuning.upper_bound(1, 10)
    assert (1 - bound) ** 10 + 10 * bound * (1 - bound) ** 9 == pytest.approx(0.05)
    assert tuning.upper_bound(4, 4) == 1.0


def test_notes_say_what_so_many_rows_can_show() -> None:
    assert tuning.notes({"a": 150, "b": 50}) == [
        "200 calibration rows: the smallest share that they can show is 0.50%, and none of them flipped still leaves "
        "up to 1.50% possible (95 %)"
    ]
    (said,) = tuning.notes({"a": 0, "b": 0})
    assert said.startswith("a, b: no calibration rows, so only fp32 is accepted; calibration rows come from")


def test_what_is_accepted_after_verdicts() -> None:
    stamp = tuning.Stamp("cpu:x", 4)
    gpu = Speed(tokens_per_s=9e5, cores=16)
    before = {
        "fp32": FP32.model_copy(update={"speeds": {"cuda:bf16": gpu}}),
        "bf16": Profile(tolerance=0.3, speeds={"cuda:bf16": gpu}),
        "fp16": Profile(tolerance=0.1, speeds={"cuda:bf16": gpu}),
        "int8": Profile(tolerance=0.4),
    }
    verdicts = [
        tuning.judge("fp32", {}, worst=0, missing=[], max_flips=0.005, speed=100),
        verdict({"a": change()}, worst=0.02),
        replace(verdict({"a": change(flips=9)}), name="int8"),
    ]
    found = tuning.merged(before, verdicts, stamp, max_flips=0.005)
    assert list(found) == ["fp32", "bf16", "fp16"]  # int8 is refused
    assert found["fp16"] == before["fp16"]  # not measured here
    assert found["bf16"].tolerance == 0.3  # that of the GPU is wider
    assert (found["bf16"].flips, found["bf16"].rows, found["bf16"].max_flips) == (0, 200, 0.005)
    assert {key: one.tokens_per_s for key, one in found["bf16"].speeds.items()} == {"cuda:bf16": 9e5, "cpu:x": 100.0}
    assert found["bf16"].speeds["cpu:x"].versions.keys() == {"mtserve", "torch", "transformers"}
    settled = stamp.settled(found["bf16"], threads=2, keep_memory=True).speeds["cpu:x"]
    assert (settled.threads, settled.keep_memory, settled.cores) == (2, True, 4)


def test_what_is_measured_where() -> None:
    zen = Hardware("cpu", frozenset({"avx512_bf16", "avx512_vnni"}))
    assert tuning.measurable([], zen) == ["fp32", "bf16", "int8"]
    assert tuning.measurable([], Hardware("cpu")) == ["fp32"]
    assert tuning.measurable(["bf16"], Hardware("cpu")) == ["fp32", "bf16"]  # asked for, though it will not pay
    assert tuning.measurable([], Hardware("cuda", frozenset({"bf16"}))) == ["fp32", "bf16", "fp16"]
    with pytest.raises(ConfigError, match="profile 'int8' does not run on cpu; those that do: fp32, bf16"):
        tuning.measurable(["int8"], Hardware("cpu"))


# speeds


def test_rounds_begin_with_another_way_each_time_and_give_medians() -> None:
    asked: list[str] = []
    rates = {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 4.0, 30.0])}

    def rate(way: str) -> float:
        asked.append(way)
        return next(rates[way])

    found = speeds.interleaved(["a", "b"], rate, rounds=3)
    assert speeds.medians(found) == {"a": 2.0, "b": 5.0}
    assert speeds.unsteady({**found, "c": [10.0, 10.0, 14.0]}) == ["a", "b"]
    assert "".join(asked) == "abbaab"


def test_equally_fast_ways_leave_what_is_usual() -> None:
    assert speeds.thread_counts(1) == [1]
    assert speeds.thread_counts(6) == [1, 2, 4, 6]
    assert speeds.best({1: 100.0, 2: 190.0, 4: 185.0}) == 4
    assert speeds.best({1: 100.0, 2: 190.0, 4: 150.0}) == 2


def test_work_is_stated_and_the_same_in_every_way() -> None:
    small = tiny("bert", only=("topic",))
    sample = KINDS["classification"].sample(small.tasks[0].options)
    work = speeds.Workload.of(small.engine, {"topic": [sample]})
    assert work.tokens == work.times * small.engine.prepare("topic", sample).tokens >= small.engine.max_batch_tokens
    before = small.engine.backend.tokens
    work.seconds(small.engine)
    assert small.engine.backend.tokens - before == work.tokens


# the whole


@pytest.fixture(scope="module")
def quick() -> Any:
    """Rounds that take no time."""
    with pytest.MonkeyPatch.context() as patch:

        def little(engine: Engine, examples: dict[str, Any], **_: Any) -> speeds.Workload:
            return speeds.Workload([(task, some[0]) for task, some in examples.items()], 1, 9)

        patch.setattr(speeds, "ROUNDS", 1)
        patch.setattr(speeds.Workload, "of", little)
        patch.setattr(comparison, "RESAMPLES", 20)
        patch.setattr(machine, "keep_memory", lambda: False)
        patch.setattr(hardware, "hardware", lambda device: Hardware("cpu", frozenset({"avx512_bf16"})))
        yield


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("tuning") / "bert", tiny("bert", only=("topic", "names"))).folder


@pytest.fixture
def folder(sealed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sealed, tmp_path / "c"))


def test_tuning_records_what_serving_then_takes(folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dry = tuning.tune(Checkpoint.open(folder), max_flips=1.0, dry_run=True)
    assert not dry.recorded
    assert list(Checkpoint.open(folder).manifest.profiles) == ["fp32"]
    monkeypatch.setattr(
        speeds, "of_profiles", lambda engine, names, work: dict(zip(names, ([100.0], [250.0]), strict=True))
    )
    said: list[str] = []
    report = tuning.tune(Checkpoint.open(folder), max_flips=1.0, say=said.append)
    assert said[0].startswith("cpu:avx512_bf16: 2 profiles, ")
    assert (report.rows, report.smallest_share) == ({"topic": 12, "names": 12}, 1 / 24)
    bf16 = report.verdicts[1]
    assert (bf16.name, bf16.rows, set(bf16.tasks)) == ("bf16", 24, {"topic", "names"})
    assert 0 < 2 * bf16.difference == pytest.approx(bf16.tolerance, rel=0.05)
    manifest = Checkpoint.open(folder).manifest
    assert bf16.accepted
    assert report.chosen == load_checkpoint(Checkpoint.open(folder)).backend.profile == "bf16"
    speed = manifest.profiles["bf16"].speeds["cpu:avx512_bf16"]
    assert (speed.tokens_per_s, speed.cores) == (250.0, machine.usable_cores())
    assert speed.threads == report.best_threads in report.threads
    assert manifest.profiles["fp32"].speeds["cpu:avx512_bf16"].threads is None
    again = tuning.tune(Checkpoint.open(folder), max_flips=1.0, threads=1)
    assert (again.best_threads, list(again.threads)) == (1, [1])
    assert json.loads(json.dumps(report.as_dict()))["verdicts"][1]["tasks"]["topic"]["rows"] == 12


def test_a_profile_that_answers_otherwise_is_refused(folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trunk whose precision loses all: what was accepted before is so no longer."""
    real = loading.in_profile

    def worse(engine: Engine, profile: str) -> Engine:
        made = real(engine, profile)
        if profile == "bf16":
            launch = made.backend.launch

            def turned(batch: Batch) -> Done:
                return Done({task: [-3 * a for a in of] for task, of in launch(batch).result().items()})

            monkeypatch.setattr(made.backend, "launch", turned)
        return made

    accepted = {"fp32": FP32, "bf16": Profile(tolerance=0.1)}
    before = accept_profiles(Checkpoint.open(folder), accepted)
    monkeypatch.setattr(tuning, "in_profile", worse)
    report = tuning.tune(before)
    assert (report.chosen, report.verdicts[1].accepted) == ("fp32", False)
    assert "flips, at most 0.50% allowed" in report.verdicts[1].reason
    assert "topic: macro_f1 falls by" in report.verdicts[1].reason
    assert list(Checkpoint.open(folder).manifest.profiles) == ["fp32"]


def test_a_profile_that_cannot_be_made_is_refused(folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loading.in_profile

    def broken(engine: Engine, profile: str) -> Engine:
        if profile == "bf16":
            raise NotImplementedError("no such kernel")
        return real(engine, profile)

    monkeypatch.setattr(tuning, "in_profile", broken)
    report = tuning.tune(Checkpoint.open(folder))
    assert (report.verdicts[1].accepted, report.verdicts[1].reason) == (False, "NotImplementedError: no such kernel")
    json.dumps(report.as_dict(), allow_nan=False)


def test_without_calibration_rows_only_fp32_is_accepted(tmp_path: Path, quick: Any) -> None:
    small = tiny("bert", only=("topic", "names"))
    made = write_labelled(tmp_path / "c", small, count=3, bare=("names",))
    report = tuning.tune(made, max_flips=1.0)
    assert [(one.name, one.accepted) for one in report.verdicts] == [("fp32", True), ("bf16", False)]
    assert report.verdicts[1].reason == "no calibration rows of names"
    none = tuning.tune(write_labelled(tmp_path / "d", small, bare=("topic", "names")), max_flips=1.0)
    assert (none.chosen, none.smallest_share) == ("fp32", None)


def test_a_checkpoint_that_is_no_longer_its_golden_rows_is_not_tuned(tmp_path: Path, quick: Any) -> None:
    made = write_labelled(tmp_path / "c", tiny("bert", only=("topic",)), count=2)
    path = made.folder / str(made.task("topic").golden)
    row = json.loads(path.read_text())
    row["logits"][0][0] += 1
    path.write_text(json.dumps(row))
    raw = json.loads((made.folder / "mtserve.json").read_text())
    changed_file = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    raw["files"][str(made.task("topic").golden)] = changed_file
    (made.folder / "mtserve.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="golden rows are not reproduced in fp32"):
        tuning.tune(Checkpoint.open(made.folder))


def test_generation_is_compared_by_its_texts(tmp_path: Path, quick: Any) -> None:
    report = tuning.tune(write_labelled(tmp_path / "c", tiny("gpt2", only=("forth",)), count=3), max_flips=1.0)
    assert report.verdicts[1].tasks["forth"].metric == "bleu"


def test_the_command(folder: Path) -> None:
    argv = [sys.executable, "-m", "mtserve", "tune", str(folder), "--threads", "1", "--max-flips", "1"]
    quickly = [*argv, "--profile", "bf16", "--seconds", "0.05", "--dry-run"]
    done = subprocess.run(quickly, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[0] == "fp32"
    assert "24 calibration rows: the smallest share that they can show is 4.17%" in done.stdout
    assert done.stdout.strip().endswith("not recorded (--dry-run)")
    bad = subprocess.run([*argv, "--profile", "fp4"], capture_output=True, text=True, timeout=300, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "profile 'fp4' does not run on cpu" in bad.stderr
