"""`rnnserve completion`: the script that has a shell complete the command."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

VARIABLE = "_RNNSERVE_COMPLETE"
"""What click looks for in the environment."""


@click.command(short_help="Print what has a shell complete this command.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    r"""Print a script that has SHELL complete subcommands, options, files, and the names of a server's models.

    \b
      bash  eval "$(rnnserve completion bash)"                          in ~/.bashrc
      zsh   eval "$(rnnserve completion zsh)"                           in ~/.zshrc, below compinit
      fish  rnnserve completion fish > ~/.config/fish/completions/rnnserve.fish
    """
    made = get_completion_class(shell)
    assert made is not None  # noqa: S101 - click has those three
    click.echo(made(context.find_root().command, {}, "rnnserve", VARIABLE).source())
