"""The command line: parse, call one function, map errors to exit codes (0 fine, 1 some failed, 2 usage or setup).

Data goes to stdout, messages to stderr. Knows no model and no route; every command is a thin client of the library.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mtserve.errors import InputError, MissingExtraError, MtserveError

app = typer.Typer(
    name="mtserve",
    help="One encoder, every task: train, inspect, call and serve multitask checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="A checkpoint folder, or a hub id (owner/name or owner/name@revision).")]


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="The run file, or the name of a recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it: training.epochs=1 seed=3 …")] = None,
    plan: Annotated[bool, typer.Option(help="Say what the run would do and how long, and train nothing.")] = False,
    trunk: Annotated[list[str] | None, typer.Option(help="Run once on each of several, and compare.")] = None,
) -> None:
    """mtserve train RUN.yaml training.epochs=1

    Train the tasks of a run file on one trunk and seal the checkpoint. Runs `python -m training` as a child.
    """
    options = [*(["--plan"] if plan else []), *(f"--trunk={one}" for one in trunk or ())]
    child = subprocess.run([sys.executable, "-m", "training", *options, run, *(overrides or [])], check=False)
    raise typer.Exit(child.returncode)


@app.command()
def serve(
    models: Annotated[list[str], typer.Argument(help="Checkpoints: folders or hub ids, all in one process.")],
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
    task: Annotated[list[str] | None, typer.Option(help="A task; may be repeated. One-task models need none.")] = None,
    parameters: Annotated[str, typer.Option(help="JSON object with parameters of the task.")] = "{}",
) -> None:
    """mtserve predict runs/demo "My parcel never came." --task intent --task sentiment

    Answer some inputs: one JSON line each on stdout, with a key for each task.
    """
    from mtserve.loading import load

    items = [_item(text) for text in _lines(inputs)]
    chosen = _json_object(parameters)
    engine = load(model)
    names = task or (list(engine.tasks) if len(engine.tasks) == 1 else [])
    if not names:
        raise typer.BadParameter(f"choose --task from {', '.join(engine.tasks)}", param_hint="--task")
    works = [engine.prepare_all(name, items, chosen) for name in names]
    flat = engine.run([work for of_task in works for work in of_task])
    for index in range(len(items)):
        answer = {name: flat[at * len(items) + index] for at, name in enumerate(names)}
        typer.echo(json.dumps(answer, ensure_ascii=False))


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
    from mtserve import inspection
    from mtserve.checkpoint import Checkpoint
    from mtserve.resolve import resolve

    checkpoint = Checkpoint.open(resolve(model))
    facts = inspection.describe(checkpoint)
    failed = False
    if verify:
        reports = inspection.verify(checkpoint)
        failed = not all(report.reproduced for report in reports)
        facts["golden"] = {
            r.task: {"rows": r.rows, "difference": _finite(r.difference), "ok": r.reproduced} for r in reports
        }
    if against is not None:
        facts["against"] = inspection.compare(checkpoint, Checkpoint.open(resolve(against)))
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False, indent=1))
    else:
        _print_facts(facts)
    raise typer.Exit(1 if failed else 0)


@app.command()
def demo(
    check: Annotated[bool, typer.Option("--check", help="Do all of it, check the answers, stop and exit.")] = False,
    output: Annotated[Path, typer.Option(help="Where the checkpoint is kept.")] = Path("demo-checkpoint"),
    trunk: Annotated[str | None, typer.Option(help="A trunk folder or hub id instead of the packaged one.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")] = 3000,
) -> None:
    """mtserve demo --check

    Train five small tasks on one packaged encoder, serve them, show a call and its answer for each.
    """
    from mtserve.demo.run import run_demo

    raise typer.Exit(run_demo(output=output, trunk=trunk, port=port, check=check))


def _lines(inputs: list[str]) -> list[str]:
    if inputs == ["-"]:
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    return inputs


def _item(text: str) -> Any:
    """A text as it is; what begins like a JSON object is one."""
    return _json_object(text) if text.lstrip().startswith("{") else text


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{text!r} is not a JSON object")
    return value


def _finite(value: float) -> float | None:
    """A number as JSON can hold it."""
    return value if math.isfinite(value) else None


def _print_facts(facts: dict[str, Any]) -> None:
    trunk, mib = facts["trunk"], {name: size / 2**20 for name, size in facts["bytes"].items()}
    longest = "rows of any length" if trunk["max_length"] is None else f"rows up to {trunk['max_length']} tokens"
    typer.echo(f"{facts['folder']}: format {facts['format']}, written by {facts['written_by']}")
    typer.echo(
        f"trunk: {trunk['family']} from {trunk['source']}, {trunk['parameters'] / 1e6:.1f}M parameters, {longest}"
    )
    typer.echo(f"fingerprint: {trunk['fingerprint']}")
    typer.echo(f"on disk: {mib['all']:.1f} MiB, of which trunk {mib['trunk']:.1f} and heads {mib['heads']:.2f}")
    for task in facts["tasks"]:
        labels = f" of {', '.join(task['labels'])}" if task["labels"] else ""
        typer.echo(f"\n{task['name']}: {task['kind']}{labels}")
        options = {name: value for name, value in task["options"].items() if name not in {"labels", "preparation"}}
        typer.echo("  options: " + ", ".join(f"{name} {json.dumps(value)}" for name, value in options.items()))
        alone = "" if task["shares_passes"] else " (its own: it shares no passes with the other tasks)"
        if task["preparation"] or alone:
            typer.echo(f"  preparation: {', '.join(task['preparation']) or 'none'}{alone}")
        if task["metrics"]:
            typer.echo("  metrics: " + ", ".join(f"{name} {value:.3f}" for name, value in task["metrics"].items()))
        typer.echo(f"  rows: {task['golden_rows']} golden, {task['calibration_rows']} calibration")
        report = facts.get("golden", {}).get(task["name"])
        if report:
            verdict = "reproduced" if report["ok"] else "NOT reproduced"
            difference = "not finite" if report["difference"] is None else f"{report['difference']:.2g}"
            typer.echo(f"  golden rows {verdict}, largest difference {difference}")
    if "against" in facts:
        typer.echo("\nagainst the other model: " + json.dumps(facts["against"], ensure_ascii=False, indent=1))


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
