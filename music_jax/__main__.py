"""Lists the commands, or runs one: `music-jax COMMAND` is `python -m music_jax.COMMAND`."""

import difflib
import runpy
import sys

from music_jax import cli
from music_jax.errors import UserError
from music_jax.version import __version__


def main() -> None:
    """Runs the command that the command line names; without one, lists the commands."""
    arguments, commands = sys.argv[1:], cli.commands()
    with cli.exit_on_closed_pipe():
        if arguments == ["--version"]:
            print(f"music_jax {__version__}")
        elif not arguments or arguments in (["--help"], ["-h"]):
            print("Usage: music-jax COMMAND [FLAGS], or python -m music_jax.COMMAND [FLAGS]\n")
            for name, summary in commands.items():
                print(f"  {name:20s}{summary}")
            print("\nmusic-jax COMMAND --help describes a command; music-jax --version")
        elif arguments[0] in commands:
            sys.argv = arguments
            if "" not in sys.path:  # `python -m` finds the user's modules in the current folder
                sys.path.insert(0, "")
            runpy.run_module(f"music_jax.{arguments[0]}", run_name="__main__", alter_sys=True)
        else:
            near = difflib.get_close_matches(arguments[0], commands, n=1)
            advice = f"did you mean {near[0]}?" if near else f"expected {', '.join(commands)}"
            cli.fail(UserError(f"unknown command {arguments[0]!r}; {advice}"))


if __name__ == "__main__":
    main()
