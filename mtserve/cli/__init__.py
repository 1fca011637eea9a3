"""The command line: parse, call one function, map errors to exit codes (0 fine, 1 some failed, 2 usage or setup).

Data goes to stdout, messages to stderr. Knows no model and no route; every command is a thin client of the library.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mtserve.cli import chains, exporting, heads, importing, scoring
from mtserve.cli.arguments import Model, json_object
from mtserve.errors import MissingExtraError, MtserveError

app = typer.Typer(
    name="mtserve",
    help="One encoder, every task: train, inspect, call and serve multitask checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(importing.commands, name="import")
app.add_typer(heads.commands, name="heads")
app.add_typer(chains.commands, name="chains")
app.command()(exporting.export)
app.command()(scoring.score)


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="The run file, or the name of a recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it: training.epochs=1 seed=3 …")] = None,
    plan: Annotated[bool, typer.Option(help="Say what the run would do and how long, and train nothing.")] = False,
    trunk: Annotated[list[str] | None, typer.Option(help="Run once on each of several, and compare.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Run from so many seeds in a row, and give means.")] = None,
    transfer: Annotated[bool, typer.Option(help="Run each task alone too: what does sharing bring?")] = False,
    push: Annotated[str | None, typer.Option(help="Send the checkpoint to the hub: owner/name.")] = None,
) -> None:
    """mtserve train RUN.yaml training.epochs=1

    Train the tasks of a run file on one trunk and seal the checkpoint. Runs `python -m training` as a child.
    """
    flags = [name for name, given in (("--plan", plan), ("--transfer", transfer)) if given]
    options = [*flags, *(f"--trunk={one}" for one in trunk or ())]
    options += [f"--{name}={given}" for name, given in (("seeds", seeds), ("push", push)) if given is not None]
    child = subprocess.run([sys.executable, "-m", "training", *options, run, *(overrides or [])], check=False)
    raise typer.Exit(child.returncode)


@app.command()
def serve(
    models: Annotated[list[str], typer.Argument(help="Folders or hub ids; PREFIX=LOCATION names tasks PREFIX.TASK.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 3000,
) -> None:
    """mtserve serve runs/demo --port 3000

    Serve all tasks over HTTP until stopped; the same service as `MTSERVE_MODEL=… bentoml serve`.
    """
    try:
        from mtserve.serve.launch import command
    except ImportError as error:
        raise MissingExtraError("serving", "serve") from error
    argv, env = command(models, host=host, port=port)
    os.execve(argv[0], argv, env)  # noqa: S606 - the server takes this process's place and its process id


@app.command()
def predict(
    model: Model,
    inputs: Annotated[list[str], typer.Argument(help="Texts, or JSON objects as in a request; - reads lines.")],
    task: Annotated[
        list[str] | None, typer.Option(help="A task or chain; may be repeated. One-task models need none.")
    ] = None,
    parameters: Annotated[str, typer.Option(help="JSON object with parameters of the task (chain: by task).")] = "{}",
) -> None:
    """mtserve predict runs/demo "My parcel never came." --task intent --task sentiment

    Answer some inputs: one JSON line each on stdout, with a key for each task.
    """
    from mtserve.loading import load
    from mtserve.offline import Each

    items = [_item(text) for text in _lines(inputs)]
    chosen = json_object(parameters)
    engine = load(model)
    names = task or (list(engine.tasks) if len(engine.tasks) == 1 else [])
    if not names:
        known = ", ".join([*engine.tasks, *engine.chains])
        raise typer.BadParameter(f"choose --task from {known}", param_hint="--task")
    works: Each = {name: [*engine.prepare_all(name, items, chosen)] for name in names}
    each = engine.computed(works, dict.fromkeys(names, chosen))
    every = {name: [engine.answered(one, errors=False) for one in each[name]] for name in names}
    for answer in zip(*every.values(), strict=True):
        typer.echo(json.dumps(dict(zip(every, answer, strict=True)), ensure_ascii=False))


@app.command()
def inspect(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and reproduce the golden rows.")] = False,
    against: Annotated[str | None, typer.Option(help="Another model, to compare with.")] = None,
) -> None:
    """mtserve inspect runs/demo --verify

    Show what is in a model: trunk, tasks, labels, metrics, sizes. Exit code 1 if golden rows are not reproduced.
    """
    from mtserve import inspection, shown
    from mtserve.checkpoint import Checkpoint
    from mtserve.resolve import resolve

    checkpoint = Checkpoint.open(resolve(model))
    facts = inspection.describe(checkpoint)
    failed = False
    if verify:
        by_profile = inspection.verify_profiles(checkpoint)
        failed = not all(report.reproduced for reports in by_profile.values() for report in reports)
        found = {name: shown.golden(reports) for name, reports in by_profile.items()}
        facts |= {"golden": next(iter(found.values())), "golden_by_profile": found}
    if against is not None:
        facts["against"] = inspection.compare(checkpoint, Checkpoint.open(resolve(against)))
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False, indent=1))
    else:
        typer.echo("\n".join(shown.facts(facts)))
    raise typer.Exit(1 if failed else 0)


@app.command()
def tune(
    model: Model,
    profile: Annotated[
        list[str] | None, typer.Option(help="A profile to measure beside fp32; may be repeated.")
    ] = None,
    max_flips: Annotated[float, typer.Option(min=0, max=1, help="Largest share of rows decided otherwise.")] = 0.005,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads, instead of looking for the best.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.01, help="What a round in fp32 takes; 2 by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print, and record nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """mtserve tune runs/demo

    Measure each profile that this machine has units for, compare its answers to the calibration rows with those of
    fp32, and record in the manifest which the checkpoint accepts.
    """
    from mtserve import shown, tuning
    from mtserve.checkpoint import Checkpoint
    from mtserve.resolve import resolve
    from mtserve.settings import read_settings

    report = tuning.tune(
        Checkpoint.open(resolve(model)),
        profiles=profile or (),
        max_flips=max_flips,
        threads=threads,
        seconds=seconds,
        device=read_settings().device,
        dry_run=dry_run,
        say=lambda text: typer.echo(text, err=True),
    )
    typer.echo(
        json.dumps(report.as_dict(), ensure_ascii=False, indent=1) if as_json else "\n".join(shown.tuning(report))
    )


@app.command()
def demo(
    check: Annotated[bool, typer.Option("--check", help="Do all of it, check the answers, stop and exit.")] = False,
    output: Annotated[Path, typer.Option(help="Where the checkpoint is kept.")] = Path("demo-checkpoint"),
    trunk: Annotated[str | None, typer.Option(help="A trunk folder or hub id instead of the packaged one.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")] = 3000,
) -> None:
    """mtserve demo --check

    Train five small tasks on a packaged encoder and style translation on a packaged language model, serve both, show a
    call and its answer for each.
    """
    from mtserve.demo.run import run_demo

    raise typer.Exit(run_demo(output=output, trunk=trunk, port=port, check=check))


def _lines(inputs: list[str]) -> list[str]:
    if inputs == ["-"]:
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    return inputs


def _item(text: str) -> Any:
    """A text as it is; what begins like a JSON object is one."""
    return json_object(text) if text.lstrip().startswith("{") else text


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except MtserveError as error:
        typer.echo(f"mtserve: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
