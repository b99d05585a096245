"""`python -m music_jax`: lists the commands, and with --version says which version this is."""

import sys

from music_jax import cli
from music_jax.errors import UserError
from music_jax.version import __version__


def main(arguments: list[str]) -> None:
    """Prints the commands, or the version."""
    if arguments == ["--version"]:
        print(f"music_jax {__version__}")
    elif not arguments or arguments in (["--help"], ["-h"]):
        print("Usage: python -m music_jax.COMMAND [OPTIONS]\n")
        for name, summary in cli.commands().items():
            print(f"  {name:16s}{summary}")
        print("\npython -m music_jax.COMMAND --help tells more; python -m music_jax --version")
    else:
        cli.fail(
            UserError(
                f"unexpected argument {arguments[0]!r}; a command is started like python -m "
                f"music_jax.main, and all are {', '.join(cli.commands())}"
            )
        )


if __name__ == "__main__":
    with cli.closed_pipe_ends():
        main(sys.argv[1:])
