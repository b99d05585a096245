"""`python -m music_jax.completion`: a script that completes the commands in a shell."""

import sys

from absl import flags

from music_jax import cli
from music_jax.errors import UserError

_USAGE = """
Prints a script that completes the commands, their flags, config files and fields in a shell. It is
made from the commands as they are installed: make it anew after an update.

  bash  python -m music_jax.completion --shell=bash > ~/.music_jax.bash
        echo 'source ~/.music_jax.bash' >> ~/.bashrc
  zsh   python -m music_jax.completion --shell=zsh > ~/.music_jax.zsh
        echo 'source ~/.music_jax.zsh' >> ~/.zshrc    # below compinit
  fish  python -m music_jax.completion --shell=fish > ~/.config/fish/conf.d/music_jax.fish

Then python -m music_jax.<TAB> and launch/local.sh --config.objective.<TAB> list what there is.

Exit codes: 0 done; 2 wrong input.
"""


def main() -> None:
    """Reads the flag and prints the script."""
    shell = flags.FLAGS.shell
    if shell is None:
        raise UserError("--shell is missing: bash, zsh or fish")
    from music_jax import config_fields
    from music_jax.completion import bash, fish, zsh
    from music_jax.completion.commands import all_commands

    scripts = {"bash": bash.script, "zsh": zsh.script, "fish": fish.script}
    sys.stdout.write(scripts[shell](all_commands(), config_fields.fields()))


if __name__ == "__main__":
    flags.DEFINE_enum("shell", None, ["bash", "zsh", "fish"], "Whose script to print.")
    cli.run(main, _USAGE, on_a_run=False)
