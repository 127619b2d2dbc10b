"""`nsa`: the commands, and the one boundary where an error becomes a message and an exit code."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from nsa_cli import __version__
from nsa_cli.cli.bench import bench
from nsa_cli.cli.inspect import inspect
from nsa_cli.cli.options import PaperCommand
from nsa_cli.cli.resolve import flag_message, settings_of
from nsa_cli.cli.sample import sample
from nsa_cli.cli.train import train
from nsa_cli.errors import ExitCode, NsaError, is_out_of_memory, tells_errors


class _FrontPage(TyperGroup):
    """The help of `nsa` without typer's renderer, which loads a Markdown parser: half of the time it would take."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print it; rich writes to stdout itself."""
        from nsa_cli.cli import output

        options = [(", ".join(option.opts), str(getattr(option, "help", ""))) for option in self.get_params(ctx)]
        commands = [(name, str(command.help).split("\n")[0]) for name, command in self.commands.items()]
        output.show_front_page(self.get_usage(ctx), str(self.help), {"Commands": commands, "Options": options})


app = typer.Typer(
    name="nsa",
    cls=_FrontPage,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., int]] = {"train": train, "sample": sample, "bench": bench, "inspect": inspect}

for _name, _command in COMMANDS.items():
    # typer keeps a docstring's line breaks, which are the source file's and no reader's.
    _paragraphs = (_command.__doc__ or "").split("\n\n")
    _help = "\n\n".join(" ".join(part.split()) for part in _paragraphs)
    app.command(_name, help=_help, cls=PaperCommand if _command is bench else TyperCommand)(_command)

_LESS_MEMORY = {
    "train": "lower --micro-batch-tokens (the step stays the same), or --seq-len, --dim or --depth",
    "sample": "give fewer prompts at once, lower -n or --max-tokens, or use --dtype bfloat16",
    "bench": "lower --seq-len, --batch or --heads",
    "inspect": "give a shorter prompt or fewer --query",
}


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Train, sample, time and look into one transformer, with dense attention or Native Sparse Attention."""
    if version:
        print(f"nsa {__version__}")
    elif ctx.invoked_subcommand is None and (text := ctx.get_help()):
        # With rich, typer prints the help while making it and returns nothing.
        print(text)


def main() -> NoReturn:
    """The console script: runs the command line and leaves with its exit code."""
    if "_NSA_COMPLETE" in os.environ:
        app(prog_name="nsa")
    _open_streams()
    code = run(sys.argv[1:])
    sys.exit(_close_stdout(code))


def run(arguments: Sequence[str]) -> int:
    """The exit code of one command line. Errors are told on stderr; a traceback stands under them with -v."""
    state: dict[str, Any] = {"verbose": False}
    try:
        # typer's own main() would answer a closed pipe with exit code 1 and Ctrl-C with its own message.
        command = typer.main.get_command(app)
        with command.make_context("nsa", list(arguments), obj=state) as ctx:
            code = command.invoke(ctx)
        sys.stdout.flush()
        return int(code or 0)
    except typer.Exit as leave:
        return int(leave.exit_code)
    except SystemExit as leave:
        # rich answers a closed pipe with SystemExit(1).
        if isinstance(leave.__context__, BrokenPipeError):
            return ExitCode.CLOSED_PIPE
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BrokenPipeError:
        return ExitCode.CLOSED_PIPE
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except Exception as error:
        return _tell(error, arguments, verbose=state["verbose"])


def _tell(error: Exception, arguments: Sequence[str], *, verbose: bool) -> int:
    from nsa_cli.cli import output

    message, hint, code = explain(error, arguments)
    if hasattr(error, "format_message") and "TORCHELASTIC_RUN_ID" in os.environ and not tells_errors():
        return code  # torchrun's processes have one command line, and the first tells what is wrong with it
    # Where stderr is gone too, the exit code is all that can be said.
    with contextlib.suppress(OSError):
        output.show_error(message, hint, error if verbose else None)
    return code


def explain(error: Exception, arguments: Sequence[str] = ()) -> tuple[str, str, int]:
    """(message, hint, exit code) of any exception, in the words of the command line."""
    command = next((word for word in arguments if word in _LESS_MEMORY), "")
    if isinstance(error, NsaError):
        return error.message, error.hint, error.exit_code
    if hasattr(error, "format_message"):
        # typer's usage errors: their class has moved between its versions, their protocol has not.
        return _usage_message(error), f"nsa {command} --help lists every flag".replace("  ", " "), ExitCode.USAGE
    if is_out_of_memory(error):
        return f"out of memory: {error}", _LESS_MEMORY.get(command, ""), ExitCode.FAILURE
    flags = _flags(command)
    if isinstance(error, ValueError) and str(error).split(" = ")[0] in {*flags, "dtype", "vocab_size"}:
        return flag_message(str(error), flags), "", ExitCode.USAGE
    if isinstance(error, OSError) and error.errno is not None:
        # Files are written through write_atomic, which names them: an error without a name is stdout's.
        name = error.filename or "stdout"
        hint = "free some space, or write elsewhere" if error.errno == errno.ENOSPC else ""
        return f"{name}: {os.strerror(error.errno)}", hint, ExitCode.FAILURE
    return f"{type(error).__name__}: {error}", "this is a defect of nsa; -v shows where it came from", ExitCode.FAILURE


def _usage_message(error: Any) -> str:
    """One line, flags in front: "--steps: 'x' is not an integer"."""
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):
        close = difflib.get_close_matches(error.option_name, error.possibilities or (), n=1)
        return f"no such flag: {error.option_name}" + (f" (did you mean {close[0]}?)" if close else "")
    text = " ".join(str(error.format_message()).split())
    text = text.removeprefix("Invalid value for ").replace(": Value error, ", ": ").removesuffix(".")
    text = text.replace("Missing argument", "missing argument").replace("No such command", "no such command")
    quoted, colon, rest = text.partition(": ")
    return f"{quoted.replace(chr(39), '')}{colon}{rest}" if quoted.startswith("'") else text


def _flags(command: str) -> dict[str, str]:
    settings = settings_of(COMMANDS[command]) if command in COMMANDS else {}
    return {name: setting.flag for name, setting in settings.items()}


def _open_streams() -> None:
    """Python leaves a stream that the shell closed at None; the command gets one that behaves as a closed one does."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123
    if sys.stdout is None:
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123


def _close_stdout(code: int) -> int:
    """Flush what is left; if that fails, keep the interpreter from trying again at its end, with a traceback."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = ExitCode.CLOSED_PIPE
    except OSError as error:
        code = code or _tell(error, (), verbose=False)
    else:
        if code != ExitCode.CLOSED_PIPE:
            return code
    _to_devnull(sys.stdout)
    return code


def _to_devnull(stream: TextIO) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)
