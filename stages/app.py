"""The command line: `logit-cache COMMAND`, also `python -m logit_cache COMMAND`."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable
from types import FrameType

import typer

from ..base import processes
from ..base.errors import PipelineError, Preempted, RecipeError, storage_error
from . import (
    bench,
    cache,
    compare,
    evaluate,
    explore,
    export,
    finalise,
    gpu_check,
    import_,
    inspect,
    plan,
    prepare,
    report,
    resize,
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

EXIT_CODES = "Exit codes: 0 done, 2 usage or recipe, 3 incomplete or storage, 4 corrupt or mismatched, 75 pre-empted."
START = """\
Run a teacher once, keep what it knows, distil any number of students from that. The first steps, on a recipe of your own
or the one that ships as `demo`:

  logit-cache prepare demo     text to rows of tokens
  logit-cache cache demo       the teacher over the rows, once
  logit-cache train demo       students from the cache
  logit-cache evaluate demo    students and teacher side by side

`logit-cache --help` lists all commands, `logit-cache COMMAND --help` has the options of one and an example."""
EXAMPLES: dict[Callable[..., None], str] = {
    teach.teach: "teach tinybert4",
    prepare.prepare: "prepare demo --set corpus.row_length=256",
    plan.plan: "plan demo --gpu h100",
    resize.resize: "resize demo --minutes 8 --output runs/demo.toml",
    cache.cache: "cache demo",
    finalise.finalise: "finalise demo",
    train.train: "train demo --student student",
    evaluate.evaluate: "evaluate demo",
    report.report: "report demo",
    score.score: "score runs/demo/heldout model-Q8_0.gguf model-Q4_0.gguf --rows 100",
    inspect.inspect: "inspect runs/demo/cache --row 3",
    explore.explore: "explore runs/demo/heldout runs/demo --rows worst:20 --output explorer.html",
    verify.verify: "verify runs/demo/cache",
    submit.submit: "submit demo --dry-run",
    status.status: "status demo",
    compare.compare: "compare runs/one runs/two --output compare.png",
    study.study: "study study",
    export.export: "export runs/demo/cache exported --format jsonl",
    import_.import_: "import log_probs.jsonl --output runs/imported/cache --tokenizer gpt2",
    systems.systems: "systems distilgpt2",
    bench.bench: "bench demo --only capture",
    gpu_check.gpu_check: "gpu-check --only reduction --json gpu.json",
}
"""Every command, in the order of the help, with an example of its use."""

app = typer.Typer(
    name="logit-cache",
    help="Run a teacher once, keep what it knows, distil any number of students from that.",
    epilog=EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command, example in EXAMPLES.items():
    app.command(example.partition(" ")[0], epilog=f"Example: logit-cache {example}")(command)


OUT_OF_MEMORY = (
    "the device is out of memory: set a lower teacher.batch_rows for stage one, students.NAME.batch_rows (with more "
    "accumulate) for training, evaluation.batch_rows for evaluating"
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words:
        print(START, file=sys.stderr)
        return RecipeError.exit_code
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, _preempted)
    try:
        with shown_log():
            code = int(app(args=words, standalone_mode=False) or 0)
        # Typer turns Ctrl-C into a plain 130.
        return _fail(_interrupted(words), code) if code == 130 else code
    except (PipelineError, Preempted) as error:
        return _fail(_message(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(_interrupted(words), 130)
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        known = storage_error(error)
        if known is not None:
            return _fail(str(known), known.exit_code)
        if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: torch may not be loaded
            return _fail(f"{OUT_OF_MEMORY} ({str(error).partition('. ')[0]})", RecipeError.exit_code)
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


def _interrupted(words: list[str]) -> str:
    """What Ctrl-C leaves, and how to go on."""
    again = "the same command" if processes.launched() else shlex.join(["logit-cache", *words])
    return f"interrupted: what was finished stays; to go on: {again}"


def _message(error: PipelineError | Preempted) -> str:
    """The message of an error. Torch gives an error of a loader's worker as a traceback, which ends in the message."""
    message = str(error)
    return message.rpartition(f"{type(error).__name__}: ")[2] if message.startswith("Caught ") else message


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    who = f"process {processes.rank()}: " if processes.world_size() > 1 else ""
    print(f"error: {who}{' '.join(message.split())}", file=sys.stderr)
    return code
