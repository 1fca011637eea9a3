"""Every setting in a training run: what it changes, what it leaves as it is, and what is refused with a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import mtserve
from mtserve.errors import ConfigError, MtserveError
from mtserve.model import Model
from mtserve.tasks import KINDS
from mtserve.tasks.validation import validate
from mtserve.text import Text, text_spec
from tests.tiny import EOS, PAD, TOKENIZER_JSON, trunk_of
from tests.training.conftest import OPTIONS, Held, Run, rows
from training.config import Training
from training.finish import Result
from training.run import train
from training.runfile import read_config
from training.trainer import deadline
from training.trainer.arguments import ARGUMENTS, RUN_KEYS
from training.trainer.fit import TaskRun, Trained, arguments, fit
from training.trainer.learner import Learned
from training.trainer.weighing import loss_terms

TASKS = {"topic": "classification", "names": "token_classification"}
TEXT = Text(TOKENIZER_JSON, text_spec(TOKENIZER_JSON, pad_id=PAD, eos_id=EOS))
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """full_determinism and log levels are settings of the whole process."""
    verbosity = transformers.logging.get_verbosity()
    yield
    torch.use_deterministic_algorithms(False)
    transformers.logging.set_verbosity(verbosity)


def trained(
    *, weights: Mapping[str, float] | None = None, terms: Mapping[str, Any] | None = None, folder: Path | None = None,
    evaluator: Any = None, dropout: bool = True, **settings: Any,
) -> tuple[Trained, Weights]:  # fmt: skip
    """Two epochs over two tasks of eight examples, and the weights that come out."""
    torch.manual_seed(1)
    model, tasks = Model(trunk_of("bert")), {}
    for name, kind_name in TASKS.items():
        kind = KINDS[kind_name]
        raw = rows(kind_name, 8)
        options = kind.options.model_validate(kind.fit(raw, OPTIONS[kind_name]))
        features = [kind.features(validate(kind.labelled, row), options, TEXT) for row in raw]
        model.add(name, kind.head(options))
        wanted = {"targets": [target for _, target in features], **(terms or {})} if name == "topic" and terms else {}
        learned = Learned(kind, options, loss_terms(kind, options, **wanted)) if wanted else Learned(kind, options)
        tasks[name] = TaskRun(learned, Held(features), (weights or {}).get(name, 1.0))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
    fixed = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 2, "warmup_share": 0.0}
    found = fit(
        model, tasks, settings=Training(**{**fixed, **settings}), seed=0, pad_id=PAD, folder=folder, evaluator=evaluator
    )
    return found, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(one: Weights, other: Weights) -> set[str]:
    return {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}


def fresh() -> Weights:
    """The weights before the first step."""
    return trained(optimizer="sgd", learning_rate=1e-300, max_steps=1, weight_decay=0.0)[1]


@pytest.fixture(scope="module")
def plain() -> tuple[Trained, Weights]:
    return trained()


def test_the_same_settings_give_the_same_weights(plain: tuple[Trained, Weights]) -> None:
    assert not moved(trained()[1], plain[1])


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_optimizers(optimizer: str, plain: tuple[Trained, Weights]) -> None:
    found, weights = trained(optimizer=optimizer)
    assert all(math.isfinite(row["loss"]) for row in found.log)
    if optimizer != "adamw_torch":
        assert moved(weights, plain[1])
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("linear", [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("constant", [1.0] * 8),
        ("constant_with_warmup", [0.0, 0.5, *[1.0] * 6]),
        ("cosine", [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]),
        ("polynomial", [1 - (1 - 1e-5) * step / 8 for step in range(8)]),
    ],
)
def test_schedulers(scheduler: str, rates: list[float]) -> None:
    warm = 0.25 if scheduler == "constant_with_warmup" else 0.0
    found, _ = trained(scheduler=scheduler, warmup_share=warm, logging_steps=1)
    assert [row["learning_rate"] for row in found.log] == pytest.approx([rate * 1e-2 for rate in rates], abs=1e-9)


@pytest.mark.parametrize(("best", "rises"), [("topic.f1", True), ("topic.loss", False)])
def test_a_rate_falls_when_the_metric_gets_no_better_whichever_way_that_is(
    best: str, rises: bool, tmp_path: Path
) -> None:
    """torch takes every metric for a loss; one that rises would bring the rate down."""
    values = iter(range(100))

    def better() -> dict[str, dict[str, float]]:
        value = float(next(values))
        return {"topic": {"f1": value, "loss": -value}}

    for give, falls in ((better, False), (lambda: {"topic": {"f1": 0.5, "loss": 0.5}}, True)):
        found, _ = trained(
            scheduler="reduce_lr_on_plateau", arguments={"lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}},
            evaluator=give, eval_steps=1, best=best, folder=tmp_path / f"{rises}{falls}", logging_steps=1,
        )  # fmt: skip
        last = [row["learning_rate"] for row in found.log if "loss" in row][-1]
        assert last == (pytest.approx(1e-2 * 0.5**6) if falls else 1e-2)


def test_a_plateau_needs_evaluations() -> None:
    with pytest.raises(ConfigError, match="reduce_lr_on_plateau requires an eval strategy"):
        trained(scheduler="reduce_lr_on_plateau")


def test_half_precision(plain: tuple[Trained, Weights]) -> None:
    """bfloat16 works on every device; float16 needs an accelerator, and says so before a step."""
    found, weights = trained(bf16=True)
    assert moved(weights, plain[1])
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}
    assert found.log[0]["loss"] == pytest.approx(plain[0].log[0]["loss"], rel=0.05)
    if not torch.accelerator.is_available():
        with pytest.raises(ConfigError, match=r"fp16 would change nothing on a CPU, .* allowed: bf16"):
            trained(fp16=True)


def test_half_precision_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for found, wanted in (({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert arguments(Training(bf16="auto"), seed=0, folder=Path()).bf16 is wanted
        assert arguments(Training(bf16=not wanted), seed=0, folder=Path()).bf16 is not wanted


@pytest.fixture(scope="module")
def torchs() -> tuple[Trained, Weights]:
    """A run with torch's own dropout, as one has that computes activations again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.trainer.learner.OnCpu", nullcontext)
        return trained()


def test_checkpointed_activations_change_nothing(torchs: tuple[Trained, Weights]) -> None:
    """With dropout: masks of the second computation are those of the first."""
    found, weights = trained(gradient_checkpointing=True)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, torchs[1][name], rtol=1e-5, atol=1e-6, msg=name)
    for row, twin in zip(found.log, torchs[0].log, strict=True):
        assert row == pytest.approx(twin, rel=1e-5)
    assert found.tokens == torchs[0].tokens


def test_weights_of_tasks_and_of_classes(plain: tuple[Trained, Weights]) -> None:
    found, weights = trained(weights={"topic": 3.0})
    assert moved(weights, plain[1])
    for row in found.log:
        parts = [row.get(f"train_loss_{task}", 0.0) * row[f"train_share_{task}"] for task in TASKS]
        assert row["loss"] == pytest.approx(3 * parts[0] + parts[1], abs=1e-6)
    for terms in ({"class_weights": "balanced"}, {"class_weights": {"good": 9.0}}, {"label_smoothing": 0.3}):
        other, weights = trained(terms=terms)
        assert moved(weights, plain[1]), terms
        assert other.log[0] != plain[0].log[0], terms


@pytest.mark.parametrize(
    ("what", "frozen"),
    [
        (("trunk",), lambda name: name.startswith("trunk.")),
        (("embeddings",), lambda name: name.startswith("trunk.embeddings.")),
        (("layers:1",), lambda name: name.startswith("trunk.encoder.layer.0.")),
        (("*.bias", "heads.task:names.*"), lambda name: name.endswith(".bias") or name.startswith("heads.task:names.")),
    ],
)
def test_what_is_frozen_stays(what: tuple[str, ...], frozen: Any) -> None:
    before, (found, after) = fresh(), trained(freeze=what)
    names = {name for name in before if frozen(name)}
    assert names
    assert not moved({name: before[name] for name in names}, after)
    assert moved(before, after)
    assert found.steps == 8


def test_rates_of_layers_and_heads() -> None:
    """Plain descent for one step moves a weight by its rate times its gradient, so rates are ratios of moves."""
    step = {"optimizer": "sgd", "max_steps": 1, "weight_decay": 0.0, "max_grad_norm": 0.0, "scheduler": "constant"}
    before = fresh()

    def moves(**settings: Any) -> dict[str, float]:
        after = trained(**step, **settings)[1]
        return {name: float((tensor - before[name]).norm()) for name, tensor in after.items()}

    even, other = moves(), moves(layer_decay=0.5, head_learning_rate=1.0)
    ratios = {name: other[name] / even[name] for name in even if even[name] > 1e-4}
    kinds = {"embeddings.": 0.125, "layer.0.": 0.25, "layer.1.": 0.5, "heads.": 100.0}
    for part, ratio in kinds.items():
        found = [value for name, value in ratios.items() if part in name]
        assert found, part
        assert found == pytest.approx([ratio] * len(found), rel=0.02), part


def test_gradients_are_clipped_together() -> None:
    """The norm that is logged is that before clipping."""
    settings = {"optimizer": "sgd", "max_steps": 1, "weight_decay": 0.0, "scheduler": "constant", "learning_rate": 1.0}
    before = fresh()
    found, after = trained(max_grad_norm=0.01, **settings, logging_steps=1)
    change = math.sqrt(sum(float((tensor - before[name]).square().sum()) for name, tensor in after.items()))
    assert found.log[0]["grad_norm"] > 0.5
    assert change == pytest.approx(0.01, rel=1e-3)


def test_workers_change_nothing(plain: tuple[Trained, Weights]) -> None:
    found, weights = trained(arguments={"dataloader_num_workers": 2})
    assert not moved(weights, plain[1])
    assert found.log == plain[0].log
    more = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3}
    assert not moved(trained(arguments=more)[1], plain[1])


# Each supported argument of Transformers that a run file has no key for, in a run: None where it must change nothing.
PASSED: dict[str, tuple[Any, bool | None]] = {
    "data_seed": (5, True),
    "full_determinism": (True, None),
    "per_device_eval_batch_size": (3, None),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, True),
    "optim_args": ("eps=0.1", None),
    "adam_beta1": (0.5, True),
    "adam_beta2": (0.5, True),
    "adam_epsilon": (0.1, True),
    "activation_checkpointing_kwargs": ({"use_reentrant": False}, None),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, None),
    "logging_first_step": (True, None),
    "run_name": ("mine", None),
    "log_level": ("error", None),
    "log_level_replica": ("error", None),
    "log_on_each_node": (False, None),
    "disable_tqdm": (True, None),
    "eval_delay": (1, None),
    "eval_on_start": (True, None),
    "save_total_limit": (1, None),
    "save_on_each_node": (True, None),
    "ignore_data_skip": (True, None),
    "restore_callback_states_from_checkpoint": (False, None),
    "dataloader_num_workers": (1, None),
    "dataloader_prefetch_factor": (2, None),
    "dataloader_persistent_workers": (True, None),
    "dataloader_pin_memory": (True, None),
    "use_cpu": (True, None),
    "ddp_timeout": (60, None),
    "ddp_bucket_cap_mb": (1, None),
    "ddp_broadcast_buffers": (False, None),
    "ddp_find_unused_parameters": (True, None),
    "torch_empty_cache_steps": (2, None),
    "skip_memory_metrics": (True, None),
    "tf32": (False, None),
}
# Those that have a key of a run file, and the test here (or in a file beside this one) that trains with it.
BY_KEY = {
    "training.epochs": "trained",
    "training.max_steps": "test_gradients_are_clipped_together",
    "training.learning_rate": "test_gradients_are_clipped_together",
    "training.optimizer": "test_optimizers",
    "training.batch_size": "trained",
    "training.gradient_accumulation": "test_resume.py",
    "training.gradient_checkpointing": "test_checkpointed_activations_change_nothing",
    "training.warmup_share": "test_schedulers",
    "training.weight_decay": "test_gradients_are_clipped_together",
    "training.label_smoothing": "test_weights_of_tasks_and_of_classes",
    "training.max_grad_norm": "test_gradients_are_clipped_together",
    "training.scheduler": "test_schedulers",
    "training.bf16": "test_half_precision",
    "training.fp16": "test_half_precision",
    "training.logging_steps": "trained",
    "training.eval_steps": "test_a_rate_falls_when_the_metric_gets_no_better_whichever_way_that_is",
    "training.save_steps": "test_resume.py",
    "training.best": "test_trainer.py",
    "training.report_to": "test_trainer.py",
    "output": "test_run.py",
    "seed": "test_run.py",
}


def test_every_supported_argument_is_trained_with() -> None:
    supported = {name for name, (status, _) in ARGUMENTS.items() if status in ("supported", "run file")}
    in_two_processes = {"ddp_backend"}  # test_processes.py; alone it is refused
    assert PASSED.keys() | in_two_processes == supported - RUN_KEYS.keys()
    assert BY_KEY.keys() == set(RUN_KEYS.values())
    for test in BY_KEY.values():
        assert test in globals() or (Path(__file__).parent / test).is_file()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_kwargs. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", PASSED)
def test_arguments_are_passed_on(
    name: str, plain: tuple[Trained, Weights], torchs: tuple[Trained, Weights], tmp_path: Path
) -> None:
    value, changes = PASSED[name]
    given = {name: value}
    settings: dict[str, Any] = {}
    if name == "dataloader_prefetch_factor" or name == "dataloader_persistent_workers":
        given["dataloader_num_workers"] = 1
    if "checkpointing" in name:
        settings["gradient_checkpointing"] = True
    if name == "lr_scheduler_kwargs":
        settings["scheduler"] = "cosine_with_restarts"
    if name.startswith(("eval_", "save_")):
        settings |= {"eval_steps": 2, "best": "average", "evaluator": lambda: {"topic": {"f1": 0.5}}}
    found, weights = trained(arguments=given, folder=tmp_path, **settings)
    assert found.steps == 8
    if changes:
        assert moved(weights, plain[1])
    elif name.startswith(("eval_", "save_")):
        assert found.best_step in (2, None) or name == "eval_delay"
    elif "checkpointing" in name:
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, torchs[1][key], rtol=1e-5, atol=1e-6)
    else:
        assert not moved(weights, plain[1])
    if name == "logging_first_step":
        assert [row["step"] for row in found.log] == [1, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamz"}, "training: adamz is not a valid OptimizerNames"),
        ({"optimizer": "galore_adamw"}, "optim: galore_adamw picks its own parameters"),
        ({"optimizer": "adamw_8bit"}, "optim: adamw_8bit cannot be used"),
        ({"scheduler": "wavy"}, "training: wavy is not a valid SchedulerType"),
        ({"freeze": ("trunk.nothing",)}, "freeze: no parameter matches 'trunk.nothing'"),
        ({"freeze": ("*",)}, "leaves no parameter to train"),
        ({"report_to": ("nowhere",)}, "training: nowhere is not supported, only .*tensorboard"),
        (
            {"arguments": {"lr_scheduler_kwargs": {"nothing": 1}}, "scheduler": "polynomial"},
            "lr_scheduler_kwargs: .*nothing",
        ),
        ({"arguments": {"dataloader_prefetch_factor": 2}}, "prefetch"),
    ],
)
def test_what_cannot_work_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(**settings)


@pytest.mark.parametrize("name", ["deepspeed", "num_train_epochs", "torch_compile", "label_names", "nonsense"])
def test_arguments_that_a_run_file_cannot_pass_on(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot be given here; allowed: activation_checkpointing_kwargs"):
        Training(arguments={name: 1})


def run(path: Path, *overrides: str) -> Result:
    result = train(read_config(path, [*overrides, "resamples=0"]), base=path.parent)
    assert result is not None
    return result


def test_a_budget_ends_with_a_sealed_checkpoint(run_file: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading data alone has used it up here: one step is made all the same."""
    path = run_file(TASKS)
    result = run(path, "training.max_seconds=0.001", "training.epochs=500", "training.save_steps=1")
    assert "training stopped after 1 steps: out of time" in capsys.readouterr().err
    result.checkpoint.verify()
    ended = result.checkpoint.manifest.provenance["training"]
    assert (ended["steps"], ended["ended"]) == (1, "out of time")
    assert mtserve.load(result.folder).predict("topic", ["the great town"])
    assert not (path.parent / "out.training").exists()


def test_a_budget_ends_after_the_step_in_which_it_runs_out(run_file: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([0.0] * 4 + [math.inf])
    monkeypatch.setattr(deadline, "time", SimpleNamespace(monotonic=lambda: next(looks)))
    result = run(run_file(TASKS), "training.max_seconds=1000", "training.epochs=5000")
    assert (result.trained.steps, result.trained.ended) == (5, "out of time")


def test_a_budget_that_runs_out_in_the_last_step_has_not_ended_the_run(run_file: Run) -> None:
    result = run(run_file(TASKS), "training.max_seconds=0.001", "training.max_steps=1")
    assert result.trained.ended == "finished"


def test_a_budget_with_the_best_weights(run_file: Run) -> None:
    """An evaluation that the time left for none gives the last weights, and says so."""
    path = run_file(TASKS)
    result = run(path, "training.max_seconds=0.001", "training.eval_steps=2", "training.best=average")
    assert (result.trained.ended, result.trained.best_step, result.trained.steps) == ("out of time", None, 1)


def test_settings_of_a_run_file_that_no_task_can_use(run_file: Run) -> None:
    path = run_file({"score": "similarity"})
    for override in ("training.label_smoothing=0.1", "tasks.score.class_weights=balanced"):
        with pytest.raises(MtserveError):
            run(path, override)
    assert not (path.parent / "out").exists()
