"""`python -m training RUN key=value…`: messages and progress on stderr, the table of results on stdout."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from mtserve.errors import MissingExtraError, SetupError
from training.config import RunConfig
from training.report.tables import Line, aligned
from training.runfile import base_of, find, read_config

_HELP = """\
example: python -m training run.yaml output=runs/second training.epochs=5 tasks.intent.weight=2

Train every task of a run file, or of a recipe, on one trunk and write a checkpoint. The keys of a run file are:
{keys}.
Data paths are relative to the run file, those of a recipe to the working directory. Exit code 2 stands for a wrong run
file, data, trunk or output."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_intermixed_args(given)
    try:
        path = find(options.run)
        config = read_config(path, options.overrides)
        for line in aligned(_lines(options, config, command=shlex.join(["python", "-m", "training", *given]))):
            sys.stdout.write(line + "\n")
    except SetupError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _lines(options: argparse.Namespace, config: RunConfig, *, command: str) -> list[Line]:
    """What the command has to say on stdout, as cells. Its parts are imported late: they take seconds, and a wrong run
    file is said first."""
    base = base_of(find(options.run))
    try:
        if options.plan:
            from training.preview import preview

            each = [config.model_copy(update={"trunk": one, "trunk_name": None}) for one in options.trunks or ()]
            plans = [f"trunk {one.trunk}\n\n{preview(one, base=base)}\n" for one in each] or [
                preview(config, base=base)
            ]
            return [(line,) for line in "\n".join(plans).splitlines()]
        if options.trunks:
            from training.compare import compare

            return compare(config, options.trunks, base=base, command=command)
        from training.report.evaluate import table
        from training.run import train
    except ModuleNotFoundError as error:
        raise MissingExtraError("training", "train") from error
    result = train(config, base=base, command=command)
    return [] if result is None else table(result.scores)


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
    return parser


if __name__ == "__main__":
    sys.exit(main())
