"""The `rnnserve` command. Everything that it can do is imported when it is asked for.

Subcommands of the client are named here; those of the server and of training come from entry points of the group
"rnnserve.commands", so that an image without torch has the same command and says what to install.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

ENTRY_POINTS = "rnnserve.commands"
OWN = {
    "bench": "service.client._cli_bench:bench",
    "completion": "service.client._cli_completion:completion",
    "generate": "service.client._cli_generate:generate",
    "health": "service.client._cli_health:health",
    "models": "service.client._cli_models:models",
    "predict": "service.client._cli_predict:predict",
    "stream": "service.client._cli_stream:stream",
}
EXTRAS = {
    "onnxruntime": "cpu",
    "torch": "train",
    "onnx": "train",
    "onnxscript": "train",
    "matplotlib": "train",
    "tqdm": "train",
}
"""Extra that installs a module."""
REFUSED, USAGE, NO_CONNECTION = 1, 2, 3
INTERRUPTED, BROKEN_PIPE = 130, 141
_UNREACHABLE = (
    "; start a server by `rnnserve serve`, or say where it is by --server or RNNSERVE_SERVER, and by --tls or --ca "
    "that it has TLS"
)
_LATE = ": the server did not answer in time; --timeout gives it longer"


class Commands(click.Group):
    """Finds subcommands by name, and turns what they raise into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name every subcommand, the installed packages' own included."""
        return sorted({*super().list_commands(ctx), *OWN, *_entry_points()})

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the name of a subcommand, without importing any."""
        names = [CompletionItem(name) for name in self.list_commands(ctx) if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand. One that can't be imported says why when it is run."""
        where = OWN.get(cmd_name) or _entry_points().get(cmd_name)
        if where is None:
            return super().get_command(ctx, cmd_name)
        module, _, name = where.partition(":")
        try:
            command = getattr(import_module(module), name)
        except Exception as error:  # noqa: BLE001 - a broken subcommand leaves the others alone
            return _unavailable(cmd_name, error)
        return command if isinstance(command, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand; of a name that none has, say which was meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            close = get_close_matches(args[0], self.list_commands(ctx), n=1)
            if close:
                raise click.UsageError(f"{error.message} (Did you mean {close[0]!r}?)", ctx) from None
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run; what goes wrong on purpose is one line on standard error."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            _close_stdout()
            ctx.exit(BROKEN_PIPE)
        except ModuleNotFoundError as error:
            hint = _hint(error)
            if hint is None:
                raise
            _fail(ctx, hint, REFUSED)
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            _fail(ctx, f"{error}{_advice(error)}", code)
        return result


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="""\b
Exit codes:
  0    done
  1    the server or the model refused, or the server is not healthy
  2    wrong usage, or input that can't be read
  3    no connection to the server, or it was lost
  130  interrupted (Ctrl-C)
  141  the reader of the output went away
""",
)
@click.version_option(package_name="rnnserve", prog_name="rnnserve")
def main() -> None:
    """Train recurrent networks, export them to ONNX, serve them over gRPC, and stream an output per timestep."""


def _entry_points() -> dict[str, str]:
    from importlib.metadata import entry_points  # reads every installed package, so only when needed

    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def _hint(error: BaseException) -> str | None:
    """Say what to install for a missing module, if it is one of an extra."""
    module = (getattr(error, "name", None) or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    other = " or 'rnnserve[gpu]'" if module == "onnxruntime" else ""
    return f"this needs {module}: pip install 'rnnserve[{EXTRAS[module]}]'{other}"


def _unavailable(name: str, error: Exception) -> click.Command:
    """Stand in for a subcommand that can't be imported."""
    message = _hint(error) or f"the command can't be loaded: {error}"

    @click.command(
        name,
        short_help=f"({message})",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        add_help_option=False,
    )
    @click.pass_context
    def unavailable(ctx: click.Context) -> None:
        _fail(ctx, f"{name}: {message}", REFUSED)

    return unavailable


def _exit_code(error: BaseException) -> int | None:
    from service.client.errors import RnnserveError, Unavailable
    from service.errors import ServiceError

    if isinstance(error, Unavailable):
        return NO_CONNECTION
    return REFUSED if isinstance(error, RnnserveError | ServiceError) else None


def _advice(error: BaseException) -> str:
    """Say what to do where the words are those of gRPC, which knows nothing of this command."""
    from service.client.errors import DeadlineExceeded, Unavailable

    text = str(error)
    if isinstance(error, Unavailable) and ("failed to connect" in text or "DNS resolution failed" in text):
        return _UNREACHABLE
    return _LATE if isinstance(error, DeadlineExceeded) and text == "Deadline Exceeded" else ""


def _fail(ctx: click.Context, message: str, code: int) -> NoReturn:
    click.echo("rnnserve: " + " ".join(message.split()), err=True)
    ctx.exit(code)


def _close_stdout() -> None:
    """Point standard output nowhere, so that the interpreter's last flush does not complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


if __name__ == "__main__":
    main()
