"""The largest batch that fits into the chips' memory, in few compilations."""

from collections.abc import Callable

# The answer is at most this share below the largest that fits: more would be many compilations.
_TOLERANCE = 1 / 32


def largest_batch(memory_share: Callable[[int], float], unit: int, start: int) -> int:
    """The largest multiple of `unit` that fits, or up to 3 % less.

    What a step needs grows almost linearly with its batch, so that two batches tell about where the
    limit is; near it XLA begins to save memory, so that it is somewhat further. The bracket around
    it is closed by bisection.

    Args:
      memory_share: what a batch needs, as a share of what is there: it fits up to 1.
      unit: what the batch must be a multiple of.
      start: the first to try, a multiple of `unit`.

    Returns:
      A multiple of `unit` that was seen to fit, or 0 if none is.
    """
    shares = {start // unit: memory_share(start)}
    while True:
        # In units: the largest seen to fit, and the least seen not to.
        low = max((n for n, share in shares.items() if share <= 1), default=0)
        high = min((n for n, share in shares.items() if share > 1), default=None)
        if high is not None and high - low <= max(1, int(low * _TOLERANCE)):
            return low * unit
        candidate = _candidate(shares, low, high)
        shares[candidate] = memory_share(candidate * unit)


def _candidate(shares: dict[int, float], low: int, high: int | None) -> int:
    """A batch not yet tried, above `low` and below `high`."""
    if high is not None and len(shares) > 3:
        return (low + high) // 2
    guess = _limit(shares)
    if high is None:
        return max(low + 1, min(guess, 8 * max(low, 1)))
    return min(max(guess, low + 1), high - 1)


def _limit(shares: dict[int, float]) -> int:
    """Where the line through the two batches nearest to the limit needs all of the memory."""
    nearest = sorted(shares, key=lambda n: abs(shares[n] - 1))[:2]
    a, b = nearest[0], nearest[1] if len(nearest) > 1 else 0
    at_a, at_b = shares[a], shares.get(b, 0.0)
    if (at_a - at_b) * (a - b) <= 0:  # no line: double or halve
        return 2 * a if at_a <= 1 else a // 2
    return int(a + (1 - at_a) * (a - b) / (at_a - at_b))
