"""Which of Transformers' TrainingArguments have a meaning in multitask training, as one table. Knows no trainer.

`docs/training-arguments.md` is made of it by `page`. A plain `ReportingTrainer` takes all of them.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Literal

from mtserve.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

Status = Literal["supported", "run file", "no effect", "refused"]
TABLE: dict[Status, dict[str, str]] = {
    "supported": {
        "output_dir seed data_seed full_determinism": "The order of data follows from data_seed, else from seed.",
        "num_train_epochs max_steps": "An epoch is as long as the mixture makes it.",
        "per_device_train_batch_size": "Examples in a batch of any task that has no size of its own.",
        "per_device_eval_batch_size": "Examples in an evaluation batch.",
        "gradient_accumulation_steps": "A short last window is divided by its own number of batches.",
        "learning_rate weight_decay max_grad_norm warmup_steps": "As in Transformers.",
        "lr_scheduler_type lr_scheduler_kwargs": "Every scheduler; those that follow a metric need evaluations.",
        "optim optim_args adam_beta1 adam_beta2 adam_epsilon": "AdamW, Adafactor and all that take parameter groups.",
        "bf16 fp16 tf32": "Mixed precision; losses are computed in float32. fp16 and tf32 need a GPU.",
        "activation_checkpointing activation_checkpointing_kwargs": "Of the trunk. Nothing is reported twice.",
        "gradient_checkpointing gradient_checkpointing_kwargs": "Older names of activation_checkpointing.",
        "logging_strategy logging_steps logging_first_step": "A row covers all steps since the one before.",
        "report_to run_name": "Trackers get the rows, with every task's entries.",
        "log_level log_level_replica log_on_each_node disable_tqdm": "As in Transformers.",
        "eval_strategy eval_steps eval_delay eval_on_start": "All tasks are evaluated and logged in one row.",
        "save_strategy save_steps save_total_limit save_on_each_node": "States to resume from, with the log's sums.",
        "load_best_model_at_end metric_for_best_model greater_is_better": "By `average`, or `<task>_<metric>`.",
        "ignore_data_skip restore_callback_states_from_checkpoint": "When resuming, as in Transformers.",
        "dataloader_num_workers dataloader_prefetch_factor dataloader_persistent_workers": "They change no batch.",
        "dataloader_pin_memory": "Where there is an accelerator.",
        "use_cpu": "As in Transformers.",
        "ddp_backend ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers": "Each process has a slice of a batch.",
        "ddp_find_unused_parameters": "Needed (the default), since a batch leaves the heads of other tasks unused.",
        "torch_empty_cache_steps skip_memory_metrics": "As in Transformers.",
    },
    "run file": {"label_smoothing_factor": "Part of the losses of kinds that choose among classes; others refuse it."},
    "no effect": {
        "average_tokens_across_devices": "The loss is a mean over examples, never scaled by label counts.",
        "logging_nan_inf_filter": "Logged losses are never filtered; one that is not finite ends the run.",
        "remove_unused_columns label_names length_column_name": "Batches are what each task's collator makes.",
        "prediction_loss_only include_for_metrics": "A run evaluates through the serving engine.",
        "eval_do_concat_batches eval_accumulation_steps": "A run evaluates through the serving engine.",
        "do_train do_eval do_predict resume_from_checkpoint local_rank": "For scripts; the Trainer does not read them.",
        "project trackio_space_id trackio_bucket_id trackio_static_space_id": "Read by one tracker alone.",
        "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision": "Only with push_to_hub.",
        "fsdp_config liger_kernel_config": "Only with arguments that are refused.",
        "optim_target_modules": "Only with optimizers that take no parameter groups.",
        "use_cache": "Training never caches keys and values.",
    },
    "refused": {
        "train_sampling_strategy": "The mixture makes the batches and says which task comes when.",
        "dataloader_drop_last": "No example is left out; short batches are means over their own examples.",
        "dataloader_multiprocessing_context dataloader_in_order": "The loader starts and orders its workers itself.",
        "accelerator_config": "The batch sampler itself cuts batches into one slice a process.",
        "auto_find_batch_size": "Batch sizes belong to the tasks; a changed one would change the mixture.",
        "include_num_input_tokens_seen": "Every row counts tokens by task: train_tokens_<task>.",
        "deepspeed fsdp parallelism_config": "Weights that tasks share are saved whole, not in shards; DDP works.",
        "torch_compile torch_compile_backend torch_compile_mode": "Heads and lengths change from batch to batch.",
        "use_liger_kernel": "It replaces the losses of stock models; here the kinds compute theirs.",
        "neftune_noise_alpha": "Its hook needs a stock model's embeddings.",
        "bf16_full_eval fp16_full_eval": "Metrics are those of the weights that will be served.",
        "batch_eval_metrics eval_use_gather_object": "Metrics are those of whole splits.",
        "save_only_model": "Such a state cannot be resumed from; the sealed checkpoint holds the model alone.",
        "enable_jit_checkpoint": "A stopped run goes on from its last saved state (save_steps).",
        "ddp_static_graph": "Which parameters a batch uses depends on its task.",
        "push_to_hub": "States to resume from are no models to publish.",
        "debug": "Its hooks are for stock models on one device.",
    },
}
_OF_RUN_FILE = {
    "output": "output_dir",
    "seed": "seed",
    "training.epochs": "num_train_epochs",
    "training.max_steps": "max_steps",
    "training.learning_rate": "learning_rate",
    "training.optimizer": "optim",
    "training.batch_size": "per_device_train_batch_size",
    "training.gradient_accumulation": "gradient_accumulation_steps",
    "training.gradient_checkpointing": "activation_checkpointing gradient_checkpointing",
    "training.warmup_share": "warmup_steps",
    "training.weight_decay": "weight_decay",
    "training.label_smoothing": "label_smoothing_factor",
    "training.max_grad_norm": "max_grad_norm",
    "training.scheduler": "lr_scheduler_type",
    "training.bf16": "bf16",
    "training.fp16": "fp16",
    "training.logging_steps": "logging_strategy logging_steps",
    "training.eval_steps": "eval_strategy eval_steps",
    "training.save_steps": "save_strategy save_steps",
    "training.best": "load_best_model_at_end metric_for_best_model greater_is_better",
    "training.report_to": "report_to",
}
RUN_KEYS = {name: key for key, names in _OF_RUN_FILE.items() for name in names.split()}
"""Arguments for which a run file has keys of its own."""
ARGUMENTS = {name: (status, why) for status in TABLE for names, why in TABLE[status].items() for name in names.split()}
"""Argument -> (status, a sentence), in the order of the table."""
FROM_RUN_FILE = frozenset(name for name, (status, _) in ARGUMENTS.items() if status == "supported") - RUN_KEYS.keys()
"""What a run file may pass on under `training.arguments`: supported, and without a key of its own."""


def check_arguments(args: TrainingArguments) -> None:
    """Raise ConfigError that names every argument that cannot be used: found, allowed, and why."""
    from transformers.trainer_pt_utils import AcceleratorConfig

    problems = []
    for field in fields(args):
        status, why = ARGUMENTS.get(field.name, ("refused", "It is newer than this version knows."))
        found, default = getattr(args, field.name, None), None if field.default is MISSING else field.default
        if isinstance(found, AcceleratorConfig) and found == AcceleratorConfig():
            continue  # Transformers puts it in the place of None
        if status in ("refused", "run file") and found != default and (found or default):
            instead = f", and {RUN_KEYS[field.name]} in a run file" if status == "run file" else ""
            problems.append(f"{field.name}={found!r} cannot be used. {why} Allowed: {default!r}{instead}.")
    if problems:
        raise ConfigError("training arguments: " + " ".join(problems))


def page() -> str:
    """The table as Markdown, one line an argument, sorted by name."""
    lines = ["| argument | in multitask training | key of a run file | |", "|---|---|---|---|"]
    for name, (status, why) in sorted(ARGUMENTS.items()):
        key = RUN_KEYS.get(name, "training.arguments" if name in FROM_RUN_FILE else "")
        said = {"run file": "supported", "refused": "**refused**"}.get(status, status)
        lines.append(f"| `{name}` | {said} | {key and f'`{key}`'} | {why} |")
    return "\n".join(lines) + "\n"
