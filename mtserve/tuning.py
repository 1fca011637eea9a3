"""Which profiles a checkpoint accepts, and how fast each is on this machine. Knows no terminal.

Every profile that the hardware has units for answers all calibration rows of all tasks and is compared with fp32. It is
accepted if all hold:
1. its logits are finite numbers;
2. at most a stated share of the rows is decided otherwise (`mtserve.decisions`), counted over all tasks together;
3. no task's metric is significantly lower: the 95 % interval of its paired difference is not all below 0;
4. every task has calibration rows, since a profile is that of the trunk that all of them share.

A refusal here takes a profile out of the manifest, wherever it was accepted; profiles that this machine cannot measure
stay as they are. fp32 is always accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from mtserve import speeds
from mtserve.backends.machine import usable_cores
from mtserve.checkpoint import Checkpoint
from mtserve.comparison import Answered, Cases, changed, difference
from mtserve.engine import Engine
from mtserve.errors import CheckpointError, ConfigError, MissingExtraError
from mtserve.golden import check_golden
from mtserve.loading import in_profile, load_checkpoint
from mtserve.manifest import FP32, Change, Profile, Speed
from mtserve.profiles import PRECISIONS, Hardware, choose
from mtserve.sealing import accept_profiles
from mtserve.settings import read_settings

MAX_FLIPS = 0.005
HOW_TO = (
    "calibration rows come from a task's evaluation data when it is trained (`calibration_rows: 200` in the run file)"
)


@dataclass(frozen=True)
class Verdict:
    """What was measured of a profile, and whether the checkpoint accepts it; `reason` says why not.

    most_flips     upper 95 % bound of the share of flips that these rows leave possible (Clopper and Pearson, 1934;
                   3 / rows where none flipped)
    tokens_per_s   on this machine
    """

    name: str
    accepted: bool
    reason: str
    flips: int
    rows: int
    most_flips: float | None
    difference: float
    tolerance: float
    tasks: Mapping[str, Change]
    tokens_per_s: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **{name: value for name, value in vars(self).items() if name != "tasks"},
            "difference": self.difference if np.isfinite(self.difference) else None,
            "tasks": {task: change.model_dump() for task, change in self.tasks.items()},
        }

    @classmethod
    def failed(cls, name: str, reason: str) -> Verdict:
        """Of a profile in which the model cannot compute at all."""
        return cls(name, False, reason, 0, 0, None, np.inf, FP32.tolerance, {}, None)  # noqa: FBT003


@dataclass(frozen=True)
class Report:
    """All of a tuning. `smallest_share` is one flip among all rows: no smaller share can be seen."""

    hardware: str
    cores: int
    rows: Mapping[str, int]
    smallest_share: float | None
    max_flips: float
    work_tokens: int
    rounds: int
    verdicts: Sequence[Verdict]
    chosen: str
    threads: Mapping[int, float] = field(default_factory=dict)
    kept_memory: Mapping[bool, float] = field(default_factory=dict)
    best_threads: int | None = None
    keep_memory: bool | None = None
    notes: Sequence[str] = ()
    recorded: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = asdict(replace(self, verdicts=()))
        found["kept_memory"] = {str(kept).lower(): rate for kept, rate in self.kept_memory.items()}
        found["verdicts"] = [one.as_dict() for one in self.verdicts]
        return found


def judge(
    name: str, tasks: Mapping[str, Change], *, worst: float, missing: Sequence[str], max_flips: float, speed: float
) -> Verdict:
    """A profile's verdict from its comparison with fp32; `missing` are tasks without calibration rows."""
    flips, rows = sum(one.flips for one in tasks.values()), sum(one.rows for one in tasks.values())
    lower = [task for task, one in tasks.items() if one.high < 0]
    reasons = []
    if name != "fp32":
        if missing:
            reasons.append(f"no calibration rows of {', '.join(missing)}")
        if not np.isfinite(worst):
            reasons.append("its logits are not finite")
        if rows and flips / rows > max_flips:
            reasons.append(f"{flips / rows:.2%} flips, at most {max_flips:.2%} allowed")
        reasons += [f"{task}: {tasks[task].metric} falls by {-tasks[task].change:.4f}" for task in lower]
    tolerance = max(FP32.tolerance, float(f"{2 * worst:.2g}")) if name != "fp32" else FP32.tolerance
    bound = upper_bound(flips, rows) if rows else None
    said = "; ".join(reasons)
    return Verdict(name, not reasons, said, flips, rows, bound, worst, tolerance, dict(tasks), speed)


def upper_bound(flips: int, rows: int) -> float:
    """The largest share of flips that so many among so many rows leave possible, one-sided at 95 %."""
    from scipy.stats import beta

    return 1.0 if flips == rows else float(beta.ppf(0.95, flips + 1, rows - flips))


def tune(
    checkpoint: Checkpoint,
    *,
    profiles: Sequence[str] = (),
    max_flips: float = MAX_FLIPS,
    threads: int | None = None,
    seconds: float | None = None,
    device: str = "auto",
    dry_run: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure and compare profiles, those named or all that this hardware has units for; commit which are accepted.

    `threads` are used and recorded as they are; else the best count is looked for. A round takes about `seconds` in
    fp32. Raises ConfigError for a profile that does not run here, CheckpointError, MissingExtraError.
    """
    checkpoint.check_torch("tuning it")
    try:
        import scipy
        import sklearn

        from mtserve.backends import hardware
    except ImportError as error:
        raise MissingExtraError("tuning", "train") from error
    del scipy, sklearn
    there, cores = hardware.hardware(hardware.device(device)), usable_cores()
    names = measurable(profiles, there)
    hardware.use_threads(threads or cores)
    capture = read_settings().capture
    base = load_checkpoint(checkpoint, profile="fp32", device=device, accepted_only=False, capture=capture)
    cases = [Cases.of(checkpoint, task) for task in base.tasks.values()]
    work = _work(base, cases, seconds)
    say(f"{there.key}: {len(names)} profiles, {speeds.ROUNDS} rounds of {work.tokens} tokens each")
    failed = _failures(base, names, work)
    rounds = speeds.of_profiles(base, [name for name in names if name not in failed], work)
    rates = speeds.medians(rounds)
    verdicts = _verdicts(checkpoint, base, cases, rates, max_flips=max_flips, say=say)
    verdicts += [Verdict.failed(name, reason) for name, reason in failed.items()]
    stamp = Stamp(there.key, cores)
    accepted = merged(checkpoint.manifest.profiles, verdicts, stamp, max_flips=max_flips)
    chosen = choose({name: stamp.rates(one) for name, one in accepted.items()}, there)
    engine = in_profile(base, chosen)
    counts = [threads] if threads else speeds.thread_counts(cores)
    say(f"{chosen}: threads {', '.join(map(str, counts))}, then the allocator")
    by_threads = speeds.of_threads(engine, counts, work) if there.device == "cpu" else {}
    best = speeds.best(by_threads) if by_threads else None
    hardware.use_threads(best or threads or cores)
    by_memory = speeds.of_memory(engine, work) if there.device == "cpu" else {}
    keep = speeds.best(by_memory) if by_memory else None
    accepted[chosen] = stamp.settled(accepted[chosen], threads=best, keep_memory=keep)
    if not dry_run:
        accept_profiles(checkpoint, accepted)
    rows = {one.task.name: len(one.examples) for one in cases}
    total = sum(rows.values())
    return Report(
        *(there.key, cores, rows, 1 / total if total else None, max_flips, work.tokens, speeds.ROUNDS, verdicts),
        *(chosen, by_threads, by_memory, best, keep, [*notes(rows), *_disturbed(speeds.unsteady(rounds))], not dry_run),
    )


def measurable(wanted: Sequence[str], there: Hardware) -> list[str]:
    """fp32 and the profiles to measure. Raises ConfigError for one that is unknown or does not run here."""
    runs = [name for name, precision in PRECISIONS.items() if precision.runs(there)]
    if unknown := [name for name in wanted if name not in runs]:
        raise ConfigError(f"profile {unknown[0]!r} does not run on {there.key}; those that do: {', '.join(runs)}")
    chosen = wanted or [name for name in runs if PRECISIONS[name].pays(there)]
    return ["fp32", *(name for name in runs if name in chosen and name != "fp32")]


def notes(rows: Mapping[str, int]) -> list[str]:
    """What so many rows can show, in sentences."""
    missing, total = [task for task, count in rows.items() if not count], sum(rows.values())
    said = []
    if missing:
        said.append(f"{', '.join(missing)}: no calibration rows, so only fp32 is accepted; {HOW_TO}")
    if total:
        said.append(
            f"{total} calibration rows: the smallest share that they can show is {1 / total:.2%}, and none of them "
            f"flipped still leaves up to {3 / total:.2%} possible (95 %)"
        )
    return said


def _disturbed(profiles: Sequence[str]) -> list[str]:
    found = f"the rounds of {', '.join(profiles)} differ by more than half, so something else ran on these cores"
    return [f"{found}: tune again where nothing else does"] if profiles else []


def _work(engine: Engine, cases: Sequence[Cases], seconds: float | None) -> speeds.Workload:
    """Calibration rows; of a checkpoint without any, the kinds' samples."""
    examples = {one.task.name: one.examples for one in cases if one.examples}
    samples = {one.task.name: [one.task.kind.sample(one.task.options)] for one in cases}
    return speeds.Workload.of(engine, examples or samples, seconds=seconds)


def _failures(base: Engine, names: Sequence[str], work: speeds.Workload) -> dict[str, str]:
    """Profiles in which this model cannot be made or run, with the reason: a family may lack what one needs."""
    found = {}
    for name in names:
        try:
            work.warm(in_profile(base, name))
        except Exception as error:
            if name == "fp32":
                raise
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _verdicts(
    checkpoint: Checkpoint,
    base: Engine,
    cases: Sequence[Cases],
    rates: Mapping[str, float],
    *,
    max_flips: float,
    say: Callable[[str], None],
) -> list[Verdict]:
    """One a profile, in the order of the rates, which begins with fp32."""
    missing, there = [one.task.name for one in cases if not one.examples], [one for one in cases if one.examples]
    fp32: list[Answered] = []
    found = []
    for name, rate in rates.items():
        say(f"{name}: {sum(len(one.examples) for one in there)} calibration rows")
        engine = in_profile(base, name)
        answered = [Answered.by(engine, one) for one in there]
        fp32 = fp32 or answered
        pairs = list(zip(fp32, answered, strict=True))
        worst = max(
            *(check_golden(engine, t, checkpoint.golden(t), tolerance=np.inf).difference for t in base.tasks),
            *(difference(one, other) for one, other in pairs),
            0.0,
        )
        if name == "fp32" and not worst <= checkpoint.manifest.profiles.get("fp32", FP32).tolerance:
            raise CheckpointError(
                f"golden rows are not reproduced in fp32 (they differ by {worst:.2g}): nothing to compare with"
            )
        tasks = {one.cases.task.name: changed(one, other) for one, other in pairs} if np.isfinite(worst) else {}
        found.append(judge(name, tasks, worst=worst, missing=missing, max_flips=max_flips, speed=rate))
    return found


@dataclass(frozen=True)
class Stamp:
    """On what a tuning runs: hardware key and cores; versions and the day."""

    key: str
    cores: int

    def speed(self, rate: float) -> Speed:
        versions = {name: version(name) for name in ("mtserve", "torch", "transformers")}
        return Speed(
            tokens_per_s=round(rate, 1), cores=self.cores, versions=versions, measured=f"{datetime.now(UTC):%F}"
        )

    def rates(self, profile: Profile) -> dict[str, float]:
        return {key: speed.tokens_per_s for key, speed in profile.speeds.items()}

    def settled(self, profile: Profile, *, threads: int | None, keep_memory: bool | None) -> Profile:
        """The profile with what was best for it here."""
        best = profile.speeds[self.key].model_copy(update={"threads": threads, "keep_memory": keep_memory})
        return profile.model_copy(update={"speeds": {**profile.speeds, self.key: best}})


def merged(
    before: Mapping[str, Profile], verdicts: Sequence[Verdict], stamp: Stamp, *, max_flips: float
) -> dict[str, Profile]:
    """What the checkpoint accepts after these verdicts: profiles that were not measured as before, speeds from other
    hardware kept, and of tolerances the wider one, since golden rows must be reproduced there too."""
    found = {name: profile for name, profile in before.items() if name not in {one.name for one in verdicts}}
    for one in verdicts:
        if one.accepted:
            old = before.get(one.name, Profile(tolerance=one.tolerance))
            found[one.name] = Profile(
                tolerance=max(old.tolerance, one.tolerance),
                flips=one.flips,
                rows=one.rows,
                max_flips=max_flips,
                tasks=dict(one.tasks),
                speeds={**old.speeds, stamp.key: stamp.speed(one.tokens_per_s or 0)},
            )
    return {name: found[name] for name in (*PRECISIONS, *found) if name in found}
