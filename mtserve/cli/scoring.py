"""`mtserve score`: flags to settings, progress on stderr, a summary at the end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from mtserve.cli.arguments import Model, json_object, named
from mtserve.errors import ConfigError, MissingExtraError

Column = typer.Option(help="The column that it is in, where it has another name.", metavar="COLUMN")


def score(
    model: Model,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A file, glob, folder, URL, hub:OWNER/NAME[/CONFIG]/SPLIT, or - for JSON lines on stdin.",
        ),
    ],
    output: Annotated[
        str, typer.Argument(help="A file or URL; FOLDER/ for a file for each of the input; - for stdout.")
    ],
    task: Annotated[
        list[str] | None, typer.Option(help="A task or chain; may be repeated. One-task models need none.")
    ] = None,
    text: Annotated[str | None, Column] = None,
    text_pair: Annotated[str | None, Column] = None,
    question: Annotated[str | None, Column] = None,
    choices: Annotated[str | None, typer.Option(help="Their column, or columns with commas between.")] = None,
    words: Annotated[str | None, Column] = None,
    column: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN for any other field, such as label.")] = None,
    parameters: Annotated[str, typer.Option(help="JSON object with parameters of all tasks.")] = "{}",
    settings: Annotated[Path | None, typer.Option(help="YAML with all of this, also for each task.")] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="A column of the input that goes through; all by default, `none` for none.")
    ] = None,
    identity: Annotated[str | None, typer.Option("--id", help="A column that goes through in any case.")] = None,
    form: Annotated[str | None, typer.Option(help="nested or flat; by default nested in JSONL, else flat.")] = None,
    all_scores: Annotated[bool, typer.Option("--all-scores", help="Whole predictions beside flat columns.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Measure rows that have a truth.")] = False,
    errors: Annotated[str | None, typer.Option(help="A JSONL file for rows that fail, instead of the output.")] = None,
    max_errors: Annotated[int | None, typer.Option(min=0, help="Stop once more rows have failed.")] = None,
    input_format: Annotated[str | None, typer.Option(help="jsonl, csv, tsv, parquet or arrow.")] = None,
    output_format: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    quotes: Annotated[bool, typer.Option(help="Whether quotes in CSV and TSV quote; GLUE's files have none.")] = True,
    engine: Annotated[str, typer.Option(help="local, or ray for a Ray cluster.")] = "local",
    concurrency: Annotated[int, typer.Option(min=1, help="Most actors of a cluster.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs of each actor.")] = 0.0,
    address: Annotated[str | None, typer.Option(help="Of the cluster; by default one on this machine.")] = None,
    part_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows that are committed at once: 8192, or 512 where a task generates.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with a GPU or its part of the cores.")] = 1,
    restart: Annotated[bool, typer.Option("--restart", help="Score anew what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """mtserve score runs/demo reviews.parquet scored.parquet --task intent --task sentiment

    Answer every row of files of any size, several tasks in one pass. What was broken off goes on when the same command
    is given again. Exit code 1 if any row failed.
    """
    from mtserve.checkpoint import Checkpoint, sha256_file
    from mtserve.engine import Task
    from mtserve.loading import profile_for
    from mtserve.manifest import MANIFEST
    from mtserve.resolve import resolve
    from mtserve.score import places
    from mtserve.score.cluster import Cluster
    from mtserve.score.plan import limits_for
    from mtserve.score.progress import Progress
    from mtserve.score.run import Here, Run, TooManyErrorsError, Workers, told
    from mtserve.score.workers import Processes, engine_for
    from mtserve.settings import read_settings

    given = {"text": text, "text_pair": text_pair, "question": question, "choices": choices, "words": words}
    columns = {name: value for name, value in given.items() if value is not None} | named(column, "--column")
    kept = None if keep is None else [name for name in keep if keep != ["none"]]
    if identity is not None and kept is not None and identity not in kept:
        kept = [identity, *kept]
    flags = {
        "tasks": {name: {"parameters": json_object(parameters)} for name in task or ()},
        "columns": _several(columns),
        "form": form,
        "keep": kept,
        "all_scores": all_scores,
        "metrics": metrics,
        "max_errors": max_errors,
    }
    chosen = _settings(flags, settings)
    files = places.inputs(source, None if input_format is None else places.as_format(input_format), quotes=quotes)
    folder = resolve(model)
    checkpoint, own = Checkpoint.open(folder), read_settings()
    tasks = {one.name: Task(one.name, one.handler, one.parsed_options) for one in checkpoint.manifest.tasks}
    chains = {one.name: one for one in checkpoint.manifest.chains}
    first = [chains[name].first if name in chains else name for name in chosen.tasks or tasks]
    profile = profile_for(checkpoint, profile=None if own.profile == "auto" else own.profile, device=own.device)
    run = Run(
        tasks,
        files,
        output,
        chosen,
        chains=chains,
        output_format=None if output_format is None else places.as_format(output_format),
        errors=errors,
        limits=limits_for([tasks[name] for name in first if name in tasks], part_rows),
        model={"manifest": sha256_file(folder / MANIFEST), "profile": profile},
    )
    if checkpoint.manifest.exported is None:  # the same one in every process, whatever it would choose for itself
        own = own.model_copy(update={"profile": profile})
    by: Workers
    if engine == "ray":
        by = Cluster(str(model), own, concurrency, gpus_per_worker, address)
    elif engine != "local":
        raise ConfigError(f"--engine {engine} is unknown; allowed: local, ray")
    else:
        by = Processes(str(folder), own, workers) if workers > 1 else Here(engine_for(str(folder), own))
    try:
        with Progress(sys.stderr) as progress:
            run.say = progress.told
            summary = run.score(by, restart=restart)
    except TooManyErrorsError as error:
        typer.echo(f"mtserve: {error}; the same command goes on", err=True)
        raise typer.Exit(1) from None
    found = json.dumps(summary.as_dict(), ensure_ascii=False, indent=1) if as_json else told(summary)
    typer.echo(found, err=output == places.STREAM)
    raise typer.Exit(1 if summary.counts["errors"] else 0)


def _several(columns: dict[str, str]) -> dict[str, Any]:
    return {name: tuple(of.split(",")) if "," in of else of for name, of in columns.items()}


def _settings(flags: dict[str, Any], path: Path | None) -> Any:
    """Flags over what a file says. Raises ConfigError."""
    from mtserve.score.plan import Settings

    said: dict[str, Any] = {}
    if path is not None:
        said = _yaml(path)
    given = {name: value for name, value in flags.items() if value is not None and value is not False and value != {}}
    for name in ("tasks", "columns"):
        if name in said and name in given:
            given[name] = {**said[name], **given[name]}
    try:
        return Settings(**{**said, **given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: {first['msg']}; found {first.get('input')!r:.60}") from None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("a YAML file of settings", "score") from error
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no mapping of settings")
    return found
