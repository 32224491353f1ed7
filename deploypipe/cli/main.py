"""The program: its commands, and how every failure becomes an exit code and a message."""

import io
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from deploypipe import __version__
from deploypipe.cli import build, console, criteria, profile, sensitivity, show
from deploypipe.errors import DeployPipeError, UsageError, nearest

INTERRUPTED = 130
_SHOWN = 120  # characters of a path in a message
ENDING = (signal.SIGTERM, signal.SIGHUP)  # asked to end; the terminal is gone
TERMINATED = tuple(128 + number for number in ENDING)
_ParserError: type[Exception] = typer.BadParameter.__mro__[1]  # UsageError of whichever parser typer brings along

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=False,
    help="Prune a trained PyTorch CNN to a measured latency on a device, and prove every step.",
    epilog="Start with `deploypipe build`: it prunes a small demo network on real data, within minutes, on any machine.",
)
app.command("build")(build.build)
app.command("profile")(profile.profile)
app.command("bench")(profile.bench)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("criteria")(criteria.criteria)
app.command("inspect")(show.inspect)
app.command("algos")(show.algos)
app.command("targets")(show.targets)
app.command("doctor")(show.doctor)
app.command("compare")(show.compare)
app.command("ledger")(show.ledger)
app.command("report")(show.report)


class _Terminated(BaseException):
    """The system asked the process to end. As an exception it ends what was started for measuring, too, as Ctrl-C does."""


def _show_version(wanted: bool) -> None:
    if wanted:
        console.answer(f"deploypipe {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="Show log messages; -vv shows all.")] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    levels = (logging.ERROR, logging.INFO, logging.DEBUG)
    logging.basicConfig(stream=sys.stderr, level=levels[min(verbose, 2)], format="%(name)s: %(message)s")
    if not verbose:
        warnings.simplefilter("ignore")  # of libraries, to their callers; ours are notes and errors
    if context.invoked_subcommand is None:
        console.answer(context.get_help())


def main() -> None:
    """Run the command line and exit."""
    # Before torch is imported: on a shared machine, threads that spin while they wait for one that was descheduled
    # make training several times slower; threads that sleep cost little where the machine is idle.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # in a locale without the sign, an answer with ? is better than none
    sys.exit(run(sys.argv[1:]))


def _terminate(number: int, frame: FrameType | None) -> None:
    for ending in ENDING:
        signal.signal(ending, signal.SIG_DFL)  # what follows is cleaning up: asked again, end at once
    raise _Terminated(number)


def run(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit code (see `deploypipe.errors`)."""
    try:
        code = app(args=list(arguments), prog_name="deploypipe", standalone_mode=False, obj=tuple(arguments))
    except DeployPipeError as error:
        console.problem(str(error))
        return error.exit_code
    except _ParserError as error:
        console.problem(str(_parser_error(error)))
        return UsageError.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except _Terminated as error:
        code = 128 + error.args[0]
    except SystemExit:  # the parser's answer to a reader that has left: of its own help (`| head`) that is no failure
        code = 0 if "--help" in arguments else DeployPipeError.exit_code
    except Exception as error:
        told = _unusable(error, arguments) or _bug(error, arguments)
        console.problem(str(told))
        return told.exit_code
    if code in {INTERRUPTED, *TERMINATED}:
        console.problem(str(_interrupted(arguments)))
    return int(code or 0)


def _unusable(error: Exception, arguments: Sequence[str]) -> UsageError | None:
    """Say so if the system refuses a path that the user named: too long a name, a folder that may not be read."""
    path = str(error.filename or "") if isinstance(error, OSError) else ""
    named = (os.path.expanduser(part.rpartition("=")[2]) for part in arguments)  # noqa: PTH111 - Path's own raises
    if not path or not any(len(part) > 1 and part in path for part in named):
        return None
    shown = path if len(path) <= _SHOWN else f"{path[:_SHOWN]}..."
    return UsageError(f"'{shown}' cannot be used: {error.strerror}", at=shown, fix="name another path, or allow it to be read")  # type: ignore[attr-defined]


def _interrupted(arguments: Sequence[str]) -> DeployPipeError:
    fix = (
        "the same command resumes: what is finished is kept"
        if arguments[:1] and arguments[0] in {"build", "sensitivity"}
        else "run the same command again"
    )
    return DeployPipeError("interrupted", fix=fix)


def _parser_error(error: Any) -> UsageError:
    """Say in our own form what the parser did not understand, with the nearest valid name."""
    context = error.ctx
    path = context.command_path if context else "deploypipe"
    unknown = re.match(r"No such command '([^']*)'", error.message)
    if unknown:
        commands = [command.name for command in app.registered_commands if command.name]
        return UsageError(f"unknown command '{unknown[1]}'", at=path, fix=nearest(unknown[1], commands))
    option = getattr(error, "option_name", "")
    if option and error.message.startswith("No such option"):
        options = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
        return UsageError(f"unknown option '{option}'", at=path, fix=nearest(option, [*options, "--help"]))
    message = error.format_message().rstrip(".")
    return UsageError(message[:1].lower() + message[1:], at=path, fix=f"see `{path} --help`")


def _bug(error: Exception, arguments: Sequence[str]) -> DeployPipeError:
    text = f"deploypipe {__version__}, arguments: {list(arguments)}\n\n" + "".join(traceback.format_exception(error))
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    return DeployPipeError(f"a bug in deploypipe ({what})", at=str(_log(text)), fix="report it together with that file")


def _log(text: str) -> Path:
    """Write the text into a new file in the user's cache, or the system's temporary folder if that cannot be written."""
    from deploypipe.targets import cache_folder

    name = f"bug-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    path = cache_folder() / "logs" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="deploypipe-")) / name
        path.write_text(text)
    return path
