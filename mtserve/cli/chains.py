"""`mtserve chains …`: chains of a checkpoint's tasks come and go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtserve.errors import ConfigError

if TYPE_CHECKING:
    from mtserve.checkpoint import Checkpoint

commands = typer.Typer(help="Chain tasks of a checkpoint: answers of one are inputs of another.", no_args_is_help=True)
Own = Annotated[Path, typer.Argument(help="The checkpoint's folder, whose manifest is changed.")]


@commands.command("add")
def add(
    checkpoint: Own,
    name: Annotated[str, typer.Argument(help="The chain's name.")],
    link: Annotated[str, typer.Option(help="spans or rerank.")],
    first: Annotated[str, typer.Option(help="The task that is asked first.")],
    then: Annotated[str, typer.Option(help="The task that is asked about its answers.")],
    labels: Annotated[str | None, typer.Option(help="spans: labels to follow, with commas; all by default.")] = None,
    span: Annotated[str | None, typer.Option(help="spans: the field of the span, text_pair by default.")] = None,
    text: Annotated[str | None, typer.Option(help="spans: the field of the text, text by default; none.")] = None,
    label: Annotated[str | None, typer.Option(help="rerank: the label that answers should have.")] = None,
    candidates: Annotated[int | None, typer.Option(help="rerank: how many answers, 4 by default.")] = None,
) -> None:
    """mtserve chains add runs/hotels opinions --link spans --first targets --then sentiment

    Chain two tasks: each span that a token classification finds to a classification, or candidates of a generation
    ranked by one.
    """
    from mtserve import surgery
    from mtserve.chains import make_chain
    from mtserve.checkpoint import Checkpoint

    given: dict[str, Any] = {
        "span": span,
        "text": text,
        "label": label,
        "candidates": candidates,
        "first": first,
        "then": then,
    }
    fields = {key: value for key, value in given.items() if value is not None}
    if labels is not None:
        fields["labels"] = [one.strip() for one in labels.split(",")]
    if text == "none":
        fields["text"] = None
    try:
        chain = make_chain(name, {"link": link, **fields})
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _say(surgery.add_chain(Checkpoint.open(checkpoint), chain))


@commands.command("remove")
def remove(checkpoint: Own, names: Annotated[list[str], typer.Argument(help="The chains.")]) -> None:
    """mtserve chains remove runs/hotels opinions

    Take chains out of a checkpoint. Its tasks stay as they are.
    """
    from mtserve import surgery
    from mtserve.checkpoint import Checkpoint

    _say(surgery.remove_chains(Checkpoint.open(checkpoint), names))


def _say(checkpoint: Checkpoint) -> None:
    chains = [f"{one.name} ({one.first}, {one.then})" for one in checkpoint.manifest.chains]
    typer.echo(f"{checkpoint.folder}: {', '.join(chains) or 'no chains'}")
