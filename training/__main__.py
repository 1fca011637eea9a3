"""`python -m training RUN key=value…`, and `evaluate` of what was trained: messages and progress on stderr, tables of
results on stdout."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mtserve.errors import ConfigError, MissingExtraError, SetupError
from training.config import RunConfig
from training.report.tables import aligned
from training.runfile import base_of, find, read_config

_HELP = """\
example: python -m training run.yaml output=runs/second training.epochs=5 tasks.intent.weight=2

Train every task of a run file, or of a recipe, on one trunk and write a checkpoint. The keys of a run file are:
{keys}.
Data paths are relative to the run file, those of a recipe to the working directory. Exit code 2 stands for a wrong run
file, data, trunk or output. `python -m training evaluate --help` says how to measure a checkpoint again."""
_EVALUATE = """\
example: python -m training evaluate runs/second run.yaml --predictions answers.jsonl --parameters '{"num_beams": 4}'

Measure a sealed checkpoint on the data of a run file or recipe: every metric of each of its tasks, intervals, answers
that need no training, and the judge that the run file names. Exit code 2 as of a run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        for line in _evaluated(given[1:]) if given[:1] == ["evaluate"] else _trained(given):
            sys.stdout.write(line + "\n")
    except SetupError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _trained(given: Sequence[str]) -> list[str]:
    """What a run has to say on stdout. Its parts are imported late: they take seconds, and a wrong run file is said
    first."""
    options = _parser().parse_intermixed_args(given)
    if options.seeds is not None and options.seeds < 1:
        raise ConfigError(f"--seeds {options.seeds}: allowed: 1 or more")
    if options.transfer and options.trunks:
        raise ConfigError("--transfer is of one trunk; allowed: without --trunk, trunk=… instead")
    if options.push and (options.plan or options.transfer or options.trunks or options.seeds):
        raise ConfigError("--push is of one checkpoint; allowed: without --plan, --trunk, --seeds, --transfer")
    path, command = find(options.run), shlex.join(["python", "-m", "training", *given])
    config, base = read_config(path, options.overrides), base_of(path)
    try:
        if options.plan:
            from training.preview import preview

            each = [config.model_copy(update={"trunk": one, "trunk_name": None}) for one in options.trunks or ()]
            plans = [f"trunk {one.trunk}\n\n{preview(one, base=base)}\n" for one in each] or [
                preview(config, base=base)
            ]
            return "\n".join(plans).splitlines()
        if options.transfer:
            from training.transfer import transfer

            return aligned(transfer(config, seeds=options.seeds or 1, base=base, command=command))
        if options.trunks or options.seeds:
            from training.compare import compare

            return aligned(
                compare(config, trunks=options.trunks or (), seeds=options.seeds, base=base, command=command)
            )
        from training.report.evaluate import signed, table
        from training.run import train

        if options.push:
            from training.push import check_push, push

            check_push(options.push)
    except ModuleNotFoundError as error:
        raise MissingExtraError("training", "train") from error
    result = train(config, base=base, command=command)
    if options.push and result is not None:
        sys.stderr.write(f"pushed to {push(Path(config.output), options.push)}\n")
    return [] if result is None else [*aligned(table(result.scores)), *signed(result.scores)]


def _evaluated(given: Sequence[str]) -> list[str]:
    """What an evaluation has to say on stdout."""
    parser = _evaluate_parser()
    options = parser.parse_intermixed_args(given)
    checkpoint, names = (None, options.given) if options.zero_shot else (options.given[0], options.given[1:])
    if not names:
        parser.error("CHECKPOINT and RUN are both wanted; with --zero-shot RUN alone")
    path = find(names[0])
    config = read_config(path, names[1:])
    try:
        parameters = json.loads(options.parameters)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--parameters is no JSON: {error}") from error
    if not isinstance(parameters, dict):
        raise ConfigError(f"--parameters must be a JSON object; found {options.parameters}")
    try:
        from training.report.command import measured
    except ModuleNotFoundError as error:
        raise MissingExtraError("evaluation", "train") from error
    return measured(
        config,
        checkpoint,
        base=base_of(path),
        split=options.split,
        parameters=parameters,
        predictions=options.predictions,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description=_HELP.format(keys=", ".join(RunConfig.model_fields)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="the run file, or the name of a recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a key; the value is parsed as YAML")
    parser.add_argument("--plan", action="store_true", help="say what the run would do and how long, and train nothing")
    parser.add_argument("--trunk", action="append", dest="trunks", help="run once on each of several, and compare")
    parser.add_argument("--seeds", type=int, metavar="N", help="run from N seeds in a row, and give means")
    parser.add_argument("--transfer", action="store_true", help="run each task alone too: what does sharing bring?")
    parser.add_argument("--push", metavar="REPO", help="send the checkpoint to the hub: owner/name")
    return parser


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training evaluate",
        usage="%(prog)s [options] (CHECKPOINT | --zero-shot) RUN [key=value ...]",
        description=_EVALUATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("given", nargs="+", help="checkpoint, run file or recipe, and changes of its keys")
    parser.add_argument("--zero-shot", action="store_true", help="the untrained trunk, under the zero_shot templates")
    parser.add_argument("--split", default="eval", choices=("train", "eval", "test"), help="by default eval")
    parser.add_argument("--parameters", default="{}", metavar="JSON", help='of a request, such as {"num_beams": 4}')
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="write example and prediction as JSON lines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
