"""What a run would do, without training: the audit of its data, its schedule, and how long it will take here."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from training.config import RunConfig
from training.data.audit import audit
from training.prepare import prepare
from training.trainer.fit import arguments, make_trainer
from training.trainer.lora import add_adapters
from training.trainer.plan import measure, plan

_SAMPLED = 2000


def preview(config: RunConfig, *, base: Path) -> str:
    """Text for a terminal. Nothing is written, and no weight changes: each task's gradients are computed a few times
    on its first batches, and thrown away. Raises SetupError as the run would."""
    run = prepare(config, base=base)
    settings = config.training
    if settings.lora is not None:
        add_adapters(run.model.trunk, settings.lora)
    with tempfile.TemporaryDirectory() as folder:  # a Trainer makes its folder at once
        args = arguments(settings, seed=config.seed, folder=Path(folder))
        trainer = make_trainer(
            run.model,
            run.runs,
            args,
            settings=settings,
            seed=config.seed,
            pad_id=run.trunk.spec.pad_id,
            mixture=config.mixture,
            evaluator=dict,  # never asked: nothing is trained
        )
    trainer.current_gradient_accumulation_steps = settings.gradient_accumulation  # which only its own loop sets
    batches = {task: batch for batch in reversed(list(trainer.sampler)[:200]) for task in [batch[0].task]}

    def step(task: str) -> int:
        batch = trainer.collator(trainer.train_dataset.__getitems__(batches[task]))
        trainer.model.train()
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        trainer.model.zero_grad()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return int(batch["attention_mask"].sum())

    steps = config.result != "heads"  # whose steps cost next to nothing, and whose trunk computes each row once
    made = plan(
        trainer.sampler.schedule,
        rows={name: [len(rows) for rows, _ in of.train.features[:_SAMPLED]] for name, of in run.data.items()},
        tokens={name: of.train.lengths for name, of in run.data.items()},
        seconds_per_token=measure(step, batches) if steps and len(batches) == len(run.data) else None,
        gradient_accumulation=settings.gradient_accumulation,
        max_steps=settings.max_steps,
        world_size=args.world_size,
    )
    return "\n".join([*audit(run.data).lines(), "", made.format()])
