"""Checksums over every file of a checkpoint, to detect damage.

Orbax checks the blocks of its key-value store as it reads them, but not its JSON files, nor whether
files are missing. The checksums are written into the checkpoint's directory before it gets its
final name, so that a checkpoint without them is damaged too.
"""

import hashlib
import json
import os
import stat

from etils import epath

from music_jax.errors import UserError, one_line
from music_jax.workdir.files import BucketError, bucket_errors, in_bucket, read_json

CHECKSUMS = "CHECKSUMS.json"

# Orbax writes a time into these two after the checksums, when it renames the directory.
_STEP_METADATA = "_CHECKPOINT_METADATA"
_COMMIT_MARK = "commit_success.txt"
_TIME_FIELD = "commit_timestamp_nsecs"

_CHUNK = 1 << 22  # bytes


def write_checksums(directory: epath.Path) -> None:
    """Writes the checksums of all files below a checkpoint's directory into it."""
    record = {
        "files": {name: _fingerprint(path) for name, path in sorted(_files(directory).items())},
        "step_metadata": _step_metadata(directory),
    }
    (directory / CHECKSUMS).write_text(json.dumps(record, indent=1) + "\n")


def find_damage(directory: epath.Path) -> str | None:
    """Returns a description of the damage to a checkpoint, or None if it is intact.

    Raises:
      BucketError: The checkpoint is in a bucket that cannot be read now; this is not damage.
    """
    try:
        record = read_json(directory / CHECKSUMS)
        expected, step_metadata = dict(record["files"]), record["step_metadata"]
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except BucketError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return f"{CHECKSUMS} cannot be read"
    try:
        if _step_metadata(directory) != step_metadata:
            return f"{_STEP_METADATA} has changed"
        present = _files(directory)
        for name in sorted(expected.keys() | present.keys()):
            if name not in present:
                return f"{name} is missing"
            if name not in expected:
                return f"{name} was added after the save"
            size = present[name].stat().length  # compared first: a wrong file could have 1 TB
            if size != expected[name][0] or _fingerprint(present[name]) != expected[name]:
                return f"{name} has changed"
    except BucketError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"cannot be read: {one_line(error)}"
    return None


def check_entries(directory: epath.Path) -> None:
    """Checks the types of what Orbax reads from `checkpoints` as soon as it is opened.

    A link may lead anywhere, and reading a pipe would never end.

    Raises:
      UserError: An entry of a checkpoint is neither a file nor a directory.
    """
    if in_bucket(directory):
        return
    for path in (*directory.glob("_*"), *directory.glob("*/*")):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{path} is neither a file nor a directory; remove it")


def _files(directory: epath.Path) -> dict[str, epath.Path]:
    """Returns the files below a directory by relative name, except those that Orbax changes."""
    found: dict[str, epath.Path] = {}
    folders = [("", directory)]
    while folders:
        prefix, folder = folders.pop()
        for path in folder.iterdir():
            name = prefix + path.name
            if "://" not in str(path):
                mode = os.lstat(path).st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a link may lead anywhere
                    raise OSError(f"{name} is neither a file nor a directory")
            if path.is_dir():
                folders.append((f"{name}/", path))
            elif name not in (CHECKSUMS, _STEP_METADATA, _COMMIT_MARK):
                found[name] = path
    return found


def _fingerprint(path: epath.Path) -> list[int | str]:
    """Returns the size in bytes and the BLAKE2b hash of a file."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with bucket_errors(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return [size, digest.hexdigest()]


def _step_metadata(directory: epath.Path) -> dict:
    """Returns the step's metadata without the time that Orbax adds."""
    record = read_json(directory / _STEP_METADATA)
    return {key: value for key, value in record.items() if key != _TIME_FIELD}
