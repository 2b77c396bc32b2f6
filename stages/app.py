"""The command line: `logit-cache COMMAND`, also `python -m logit_cache COMMAND`."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import typer

from ..base import processes
from ..base.errors import PipelineError, Preempted, RecipeError, storage_error
from . import (
    bench,
    cache,
    compare,
    evaluate,
    export,
    finalise,
    import_,
    inspect,
    plan,
    prepare,
    report,
    score,
    status,
    study,
    submit,
    systems,
    teach,
    train,
    verify,
)
from .console import shown_log

app = typer.Typer(
    name="logit-cache",
    help="Run a teacher once, keep what it knows, distil any number of students from that.",
    epilog="Exit codes: 0 done, 2 usage or recipe, 3 incomplete or storage, 4 corrupt or mismatched, 75 pre-empted.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    teach.teach,
    prepare.prepare,
    plan.plan,
    cache.cache,
    finalise.finalise,
    train.train,
    evaluate.evaluate,
    report.report,
    score.score,
    inspect.inspect,
    verify.verify,
    submit.submit,
    status.status,
    compare.compare,
    study.study,
    export.export,
    systems.systems,
    bench.bench,
):
    app.command()(command)
app.command("import")(import_.import_)


INTERRUPTED = "interrupted: what was committed stays; the same command continues"
OUT_OF_MEMORY = (
    "the device is out of memory: set a lower teacher.batch_rows for stage one, students.NAME.batch_rows (with more "
    "accumulate) for training, evaluation.batch_rows for evaluating"
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, _preempted)
    try:
        with shown_log():
            code = int(app(args=arguments, standalone_mode=False) or 0)
        # Typer turns Ctrl-C into a plain 130.
        return _fail(INTERRUPTED, code) if code == 130 else code
    except (PipelineError, Preempted) as error:
        return _fail(_message(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, 130)
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        known = storage_error(error)
        if known is not None:
            return _fail(str(known), known.exit_code)
        if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: torch may not be loaded
            return _fail(f"{OUT_OF_MEMORY} ({str(error).partition('. ')[0]})", RecipeError.exit_code)
        if type(error).__name__ == "NoArgsIsHelpError":  # click's, of which Typer carries its own copy
            print(error, file=sys.stderr)
            return RecipeError.exit_code
        # Usage errors of click have an exit code and a message.
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):
            return _fail(error.format_message(), error.exit_code)
        raise


def run() -> None:
    """Entry point of the `logit-cache` script."""
    sys.exit(main())


def _preempted(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    raise Preempted(f"stopped by {name}: what was committed stays; the same command continues")


def _message(error: PipelineError | Preempted) -> str:
    """The message of an error. Torch gives an error of a loader's worker as a traceback, which ends in the message."""
    message = str(error)
    return message.rpartition(f"{type(error).__name__}: ")[2] if message.startswith("Caught ") else message


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    who = f"process {processes.rank()}: " if processes.world_size() > 1 else ""
    print(f"error: {who}{' '.join(message.split())}", file=sys.stderr)
    return code
