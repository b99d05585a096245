"""Ways to damage the files of a run."""

import pathlib
import random
import shutil
from collections.abc import Callable

Damage = Callable[[pathlib.Path, random.Random], None]


def newest_checkpoint(workdir: pathlib.Path) -> pathlib.Path:
    steps = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    return max(steps, key=lambda path: int(path.name))


def truncate(file: pathlib.Path, random: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: random.randrange(len(content))])


def flip(file: pathlib.Path, random: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(3):
        content[random.randrange(len(content))] ^= random.randrange(1, 256)
    file.write_bytes(content)


def zero(file: pathlib.Path, random: random.Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def remove(file: pathlib.Path, random: random.Random) -> None:
    file.unlink()


def in_a_file(damage: Damage) -> Damage:
    """Damages any non-empty file of a checkpoint."""

    def damage_one(checkpoint: pathlib.Path, random: random.Random) -> None:
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        files.remove(checkpoint / "commit_success.txt")  # which nothing is read from
        damage(random.choice([path for path in files if path.stat().st_size]), random)

    return damage_one


def in_the_largest_file(damage: Damage) -> Damage:
    def damage_largest(checkpoint: pathlib.Path, random: random.Random) -> None:
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        damage(max(files, key=lambda path: path.stat().st_size), random)

    return damage_largest


def empty(checkpoint: pathlib.Path, random: random.Random) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def unfinish(checkpoint: pathlib.Path, random: random.Random) -> None:
    """Makes a checkpoint look as if the run had ended while writing it."""
    in_a_file(remove)(checkpoint, random)
    checkpoint.rename(checkpoint.with_name(checkpoint.name + ".orbax-checkpoint-tmp"))


CHECKPOINT_DAMAGES: dict[str, Damage] = {
    "truncated file": in_a_file(truncate),
    "flipped bytes": in_the_largest_file(flip),
    "missing file": in_a_file(remove),
    "empty directory": empty,
    "half-written temporary": unfinish,
    "file of zeros": in_a_file(zero),
}

FILE_DAMAGES: dict[str, Damage] = {"truncated": truncate, "flipped": flip, "zeros": zero}
