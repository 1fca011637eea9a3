"""The table of TrainingArguments: complete, as the page says it, and enforced."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from mtserve.errors import ConfigError
from tests.shared_data import ROOT
from training.config import RunConfig, Training
from training.trainer.arguments import ARGUMENTS, FROM_RUN_FILE, RUN_KEYS, TABLE, check_arguments, page

FIELDS = {field.name for field in fields(TrainingArguments)}


def test_every_field_is_in_exactly_one_group() -> None:
    found = Counter(name for status in TABLE.values() for names in status for name in names.split())
    assert found.keys() == FIELDS
    assert set(found.values()) == {1}
    assert all(why.endswith(".") and why[0].isupper() for _, why in ARGUMENTS.values())


def test_the_page_has_the_table() -> None:
    text = (ROOT / "docs" / "training-arguments.md").read_text(encoding="utf-8")
    assert text.endswith("\n\n" + page()), "write the table of docs/training-arguments.md anew from page()"
    assert set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)) == FIELDS


def test_keys_of_the_run_file_exist() -> None:
    for name, key in RUN_KEYS.items():
        section, _, field = key.rpartition(".")
        assert field in (Training if section else RunConfig).model_fields, key
        assert ARGUMENTS[name][0] in ("supported", "run file")


def test_what_a_run_file_may_pass_on() -> None:
    assert {"adam_beta2", "lr_scheduler_kwargs", "dataloader_num_workers", "tf32"} <= FROM_RUN_FILE
    assert not FROM_RUN_FILE & RUN_KEYS.keys()
    assert {ARGUMENTS[name][0] for name in FROM_RUN_FILE} == {"supported"}


def test_defaults_pass(tmp_path: Path) -> None:
    check_arguments(TrainingArguments(str(tmp_path)))


@pytest.mark.parametrize(
    "given",
    [
        *[{"optim": name} for name in ("adafactor", "sgd", "adamw_torch", "rmsprop")],
        *[{"lr_scheduler_type": name} for name in ("cosine", "polynomial", "inverse_sqrt")],
        {"gradient_accumulation_steps": 4, "activation_checkpointing": True, "bf16": True, "report_to": "tensorboard"},
        {"average_tokens_across_devices": False, "remove_unused_columns": False, "logging_nan_inf_filter": False},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True},
        {"ddp_find_unused_parameters": True, "accelerator_config": {"even_batches": True}},
    ],
)
def test_supported_ones_pass(given: dict[str, Any], tmp_path: Path) -> None:
    check_arguments(TrainingArguments(str(tmp_path), use_cpu=True, eval_strategy="no", **given))


REFUSED: dict[str, Any] = {
    **{"train_sampling_strategy": "group_by_length", "dataloader_drop_last": True, "dataloader_in_order": False},
    **{"dataloader_multiprocessing_context": "spawn", "accelerator_config": {"split_batches": True}},
    **{
        "auto_find_batch_size": True,
        "include_num_input_tokens_seen": "all",
        "deepspeed": {"fp16": {}},
        "fsdp": "full_shard",
    },
    **{
        "parallelism_config": object(),
        "torch_compile": True,
        "torch_compile_backend": "eager",
        "use_liger_kernel": True,
    },
    **{"torch_compile_mode": "default", "neftune_noise_alpha": 5.0, "bf16_full_eval": True, "fp16_full_eval": True},
    **{
        "batch_eval_metrics": True,
        "eval_use_gather_object": True,
        "save_only_model": True,
        "enable_jit_checkpoint": True,
    },
    **{"ddp_static_graph": True, "push_to_hub": True, "debug": "underflow_overflow", "label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_refusals(name: str, tmp_path: Path) -> None:
    """Every refused argument stops with its sentence; values are set afterwards, as some need what is not installed."""
    status, why = ARGUMENTS[name]
    if status not in ("refused", "run file"):
        assert name not in REFUSED
        return
    args = TrainingArguments(str(tmp_path))
    setattr(args, name, REFUSED[name])
    with pytest.raises(ConfigError) as caught:
        check_arguments(args)
    assert f"{name}={REFUSED[name]!r} cannot be used. {why} Allowed: " in str(caught.value)


def test_all_refused_ones_are_named_at_once(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), dataloader_drop_last=True, accelerator_config={"split_batches": True}, label_smoothing_factor=0.1
    )
    with pytest.raises(
        ConfigError, match=r"split_batches=True.*drop_last=True|drop_last=True.*split_batches=True"
    ) as e:
        check_arguments(args)
    assert "Allowed: 0.0, and training.label_smoothing in a run file." in str(e.value)
