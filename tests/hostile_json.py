"""Hostile JSON, each determined by a random generator."""

import copy
import json
import random

from hostile_images import mutated

_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**64, -(2**70), 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "x", "\0", "\ud800", "\n", "../../outside/x", "/etc/passwd", "a" * 5000, "%s{}", "1"),
    *([], {}, [1, 2], [None], ["a"], [[[]]], {"a": 1}, {"": {}}, [1e400, 2], [0.1, 2.0]),
)


def hostile_value(rng: random.Random) -> object:
    """Returns an unusual value."""
    return copy.deepcopy(rng.choice(_VALUES))


def hostile_json(rng: random.Random, record: object) -> bytes:
    """The text of a record that is damaged, or has another value, key or form somewhere."""
    if rng.random() < 0.03:
        return rng.choice((b"[" * 100_000, b'{"a":' * 3000 + b"1" + b"}" * 3000, b"\xff\xfe", b""))
    record = copy.deepcopy(record)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        record = _changed(rng, record)
    text = json.dumps(record).encode()
    return mutated(rng, text) if rng.random() < 0.3 else text


def _changed(rng: random.Random, record: object) -> object:
    if not isinstance(record, dict | list) or not record or rng.random() < 0.1:
        return hostile_value(rng)
    keys = list(record) if isinstance(record, dict) else range(len(record))
    key = rng.choice(keys)
    action = rng.random()
    if action < 0.1:
        del record[key]
    elif action < 0.2 and isinstance(record, dict):
        record[rng.choice(("", "x", "name", "__class__", "a.b", *keys))] = hostile_value(rng)
    else:
        record[key] = _changed(rng, record[key])
    return record
