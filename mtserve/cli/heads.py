"""`mtserve heads …`: tasks of a checkpoint come, go, get another name, or are given back as stock models."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtserve.cli.arguments import Model, named
from mtserve.errors import ConfigError

if TYPE_CHECKING:
    from mtserve.checkpoint import Checkpoint

commands = typer.Typer(help="Change or give back the tasks of a checkpoint.", no_args_is_help=True)
Server = Annotated[str, typer.Argument(help="The server's address.")]
Key = Annotated[str, typer.Option(envvar="MTSERVE_ADMIN_KEY", help="A key of its operator.", show_default=False)]
Own = Annotated[Path, typer.Argument(help="The checkpoint's folder, which is changed.")]


@commands.command("add")
def add(
    checkpoint: Own,
    source: Annotated[str, typer.Argument(help="A checkpoint of the same trunk: folder or hub id.")],
    task: Annotated[list[str], typer.Option(help="TASK, or NEW=TASK for another name here; may be repeated.")],
) -> None:
    """mtserve heads add runs/demo runs/more --task urgency

    Put tasks of another checkpoint of the same trunk into this one. To train a new one: a run file with result: heads.
    """
    from mtserve import surgery
    from mtserve.checkpoint import Checkpoint
    from mtserve.resolve import resolve

    pairs = named([one if "=" in one else f"{one}={one}" for one in task], "--task")
    names = {old: new for new, old in pairs.items()}
    if len(names) < len(pairs):
        raise ConfigError(f"--task {task[-1]}: allowed is each task once")
    made = surgery.bring_heads(Checkpoint.open(checkpoint), Checkpoint.open(resolve(source)), names)
    _say(made)
    typer.echo("its tasks are served in fp32 until `mtserve tune` has measured them in other profiles", err=True)


@commands.command("remove")
def remove(checkpoint: Own, tasks: Annotated[list[str], typer.Argument(help="The tasks.")]) -> None:
    """mtserve heads remove runs/demo urgency

    Take tasks out of a checkpoint. Trunk and other tasks stay as they are.
    """
    from mtserve import surgery
    from mtserve.checkpoint import Checkpoint

    _say(surgery.remove_heads(Checkpoint.open(checkpoint), tasks))


@commands.command("rename")
def rename(
    checkpoint: Own,
    old: Annotated[str, typer.Argument(help="The task.")],
    new: Annotated[str, typer.Argument(help="Its new name.")],
) -> None:
    """mtserve heads rename runs/demo urgency priority

    Give a task another name.
    """
    from mtserve import surgery
    from mtserve.checkpoint import Checkpoint

    _say(surgery.rename_head(Checkpoint.open(checkpoint), old, new))


@commands.command("split")
def split(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The model's folder: new or empty.")],
    task: Annotated[str, typer.Option(help="The task.")],
) -> None:
    """mtserve heads split runs/demo models/intent --task intent

    Write one task as a stock Transformers model, and say in what it differs from the task.
    """
    from mtserve.checkpoint import Checkpoint
    from mtserve.interop.split import split_head
    from mtserve.resolve import resolve

    for said in split_head(Checkpoint.open(resolve(model)), task, output):
        typer.echo(said, err=True)
    typer.echo(str(output))


@commands.command("push")
def push(
    model: Model,
    server: Server,
    task: Annotated[list[str], typer.Option(help="TASK, or NAME=TASK for another name there; may be repeated.")],
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of tasks of these names.")] = False,
    untuned: Annotated[
        bool, typer.Option("--untuned", help="Also where the server's profile was not measured for the head.")
    ] = False,
    key: Key = "",
) -> None:
    """mtserve heads push runs/more http://localhost:3000 --task urgency

    Bring heads of a checkpoint to a running server that has their trunk. Its operator's key: MTSERVE_ADMIN_KEY.
    """
    from mtserve.checkpoint import Checkpoint
    from mtserve.client import Client
    from mtserve.head_file import pack_head
    from mtserve.resolve import resolve

    pairs = named([one if "=" in one else f"{one}={one}" for one in task], "--task")
    checkpoint = Checkpoint.open(resolve(model))
    with Client(server, api_key=key or None, timeout_s=300) as client, tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / str(at) for at, name in enumerate(pairs)}
        for name, own in pairs.items():  # all of them, before any is sent
            pack_head(checkpoint, own, files[name])
        for name, file in files.items():
            came = client.push_head(name, file, replace=replace, untuned=untuned)
            typer.echo(f"{server}: {name} ({came['kind']}), version {came['version']}")


@commands.command("withdraw")
def withdraw(server: Server, tasks: Annotated[list[str], typer.Argument(help="The tasks.")], key: Key = "") -> None:
    """mtserve heads withdraw http://localhost:3000 urgency

    Take tasks off a running server. Its operator's key: MTSERVE_ADMIN_KEY.
    """
    from mtserve.client import Client

    with Client(server, api_key=key or None) as client:
        for name in tasks:
            typer.echo(f"{server}: {', '.join(client.remove_head(name))}")


def _say(checkpoint: Checkpoint) -> None:
    typer.echo(f"{checkpoint.folder}: {', '.join(task.name for task in checkpoint.manifest.tasks)}")
