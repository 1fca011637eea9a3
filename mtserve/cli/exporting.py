"""`mtserve export`: a checkpoint as a bundle of ONNX graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mtserve.cli.arguments import Model
from mtserve.errors import MissingExtraError


def export(
    model: Model,
    bundle: Annotated[Path, typer.Argument(help="Folder to write, empty or not there.")],
    dtype: Annotated[str, typer.Option(help="fp32, fp16 (for GPUs) or int8.")] = "fp32",
    only: Annotated[list[str] | None, typer.Option(help="A task; may be repeated. All without it.")] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Join operators for a GPU's kernels, as fp16 always does.")
    ] = False,
    max_flips: Annotated[float, typer.Option(min=0, max=1, help="Largest share of rows decided otherwise.")] = 0.005,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """mtserve export runs/demo demo-bundle --dtype int8

    Write a checkpoint as ONNX graphs that ONNX Runtime serves without PyTorch, once they answer the calibration rows as
    the checkpoint does. Exit code 1 if they do not, and nothing is written.
    """
    from mtserve import shown
    from mtserve.bundle import as_dtype
    from mtserve.checkpoint import Checkpoint
    from mtserve.resolve import resolve

    wanted = as_dtype(dtype)
    try:
        from mtserve.export.bundling import export as exported
    except ImportError as error:
        raise MissingExtraError("export", "export") from error
    report = exported(
        Checkpoint.open(resolve(model)),
        bundle,
        dtype=wanted,
        only=only or (),
        fuse=fuse,
        max_flips=max_flips,
        say=lambda text: typer.echo(text, err=True),
    )
    found: dict[str, Any] = report.as_dict()
    typer.echo(json.dumps(found, ensure_ascii=False, indent=1) if as_json else "\n".join(shown.exported(found)))
    raise typer.Exit(0 if report.bundle is not None else 1)
