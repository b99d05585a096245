"""Divides work among several commands that write into one directory, such as a job array."""

import dataclasses
import re

from music_jax.errors import UserError

_WORKER = re.compile(r"(\d{1,6})/(\d{1,6})")


@dataclasses.dataclass(frozen=True)
class Share:
    """The work of worker `index` of `count`.

    Attributes:
      index: Index of the worker, from 0.
      count: Number of workers.
    """

    index: int
    count: int

    def of(self, size: int) -> range:
        """Returns the contiguous part of `range(size)` that belongs to this worker."""
        start, stop = (i * size // self.count for i in (self.index, self.index + 1))
        return range(start, stop)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


ALL = Share(0, 1)


def parse_share(worker: str) -> Share:
    """Parses the value of a flag `--worker=I/N`.

        >>> parse_share("1/3").of(10)
        range(3, 6)

    Raises:
      UserError: It is not of this form, or I is not below N.
    """
    match = _WORKER.fullmatch(worker)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(
            f"--worker={worker} must be I/N, such as 0/4 for the first of four workers, with I "
            "from 0 to N - 1"
        )
    return Share(int(match[1]), int(match[2]))
