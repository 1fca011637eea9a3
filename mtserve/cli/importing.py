"""`mtserve import …`: checkpoints made of models from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mtserve.cli.arguments import json_object, named
from mtserve.errors import ConfigError

commands = typer.Typer(help="Make a checkpoint of models from elsewhere.", no_args_is_help=True)

Options = Annotated[list[str] | None, typer.Option(help="NAME={JSON}: options of a task.")]
Golden = Annotated[Path | None, typer.Option(help='Inputs to keep the logits of: JSON lines, each with its "task".')]


@commands.command("notebook")
def import_notebook(
    folder: Annotated[Path, typer.Argument(help="Where `Trainer` wrote the weights.")],
    output: Annotated[Path, typer.Argument(help="The checkpoint's folder: new or empty.")],
    model: Annotated[str, typer.Option(help="What training began with: folder or hub id with config and tokenizer.")],
    task: Annotated[list[str], typer.Option(help="NAME=KIND, for each task that is wanted.")],
    labels: Annotated[list[str] | None, typer.Option(help="NAME=FIRST,SECOND,…: labels in the order of ids.")] = None,
    options: Options = None,
    golden: Golden = None,
    special_tokens: Annotated[
        str | None, typer.Option(help="BOS,EOS,PAD[,CLS…] that were added; by default <bos>,<eos>,<pad>,<cls>.")
    ] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin.")] = False,
) -> None:
    """mtserve import notebook models/multitask runs/shakespeare --model gpt2-large --task translate=generation

    Make a checkpoint of what the notebook "Multi-task Training with Hugging Face Transformers and NLP" trained.
    """
    from mtserve.interop import notebook

    chosen = {name: json_object(raw) for name, raw in named(options, "--options").items()}
    for name, listed in named(labels, "--labels").items():
        chosen[name] = {"labels": listed.split(","), **chosen.get(name, {})}
    made = notebook.import_notebook(
        folder,
        output,
        model=model,
        kinds=named(task, "--task"),
        options=chosen,
        golden=_golden(golden),
        special_tokens=None if special_tokens is None else special_tokens.split(","),
        allow_pickle=allow_pickle,
    )
    typer.echo(f"{made.folder}: {', '.join(task.name for task in made.manifest.tasks)}")


@commands.command("models")
def import_models(
    output: Annotated[Path, typer.Argument(help="The checkpoint's folder: new or empty.")],
    task: Annotated[list[str], typer.Option(help="NAME=FOLDER or NAME=HUB_ID of a task's model, for each task.")],
    kind: Annotated[list[str] | None, typer.Option(help="NAME=KIND, where the architecture does not say it.")] = None,
    options: Options = None,
    golden: Golden = None,
) -> None:
    """mtserve import models runs/both --task topic=models/topic --task names=models/names

    Merge stock Transformers models that share a frozen trunk into one checkpoint.
    """
    from mtserve.interop import models

    made = models.import_models(
        output,
        named(task, "--task"),
        kinds=named(kind, "--kind"),
        options={name: json_object(raw) for name, raw in named(options, "--options").items()},
        golden=_golden(golden),
    )
    typer.echo(f"{made.folder}: {', '.join(task.name for task in made.manifest.tasks)}")


def _golden(path: Path | None) -> dict[str, list[Any]]:
    """Inputs by task from a JSONL file."""
    from mtserve.checkpoint import read_jsonl

    found: dict[str, list[Any]] = {}
    for record in [] if path is None else read_jsonl(path):
        if "task" not in record:
            raise ConfigError(f"{path}: every line is an input with its task; found {json.dumps(record)}")
        found.setdefault(record.pop("task"), []).append(record)
    return found
