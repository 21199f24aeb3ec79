"""``shardctl completion``."""

from __future__ import annotations

import click

_INSTALL = {
    "bash": "# in ~/.bashrc:  source <(shardctl completion bash)",
    "zsh": "# in ~/.zshrc:  source <(shardctl completion zsh)",
    "fish": "# shardctl completion fish > ~/.config/fish/completions/shardctl.fish",
}


@click.command(short_help="Completion for a shell.")
@click.argument("shell", type=click.Choice(list(_INSTALL)))
def completion(shell: str) -> None:
    """Prints what makes SHELL complete shardctl's verbs and options."""
    from click.shell_completion import get_completion_class

    from coordinator.cli.app import shardctl

    kind = get_completion_class(shell)
    assert kind is not None
    print(_INSTALL[shell])
    print(kind(shardctl, {}, "shardctl", "_SHARDCTL_COMPLETE").source())
