"""Hostile changes of a run directory, as `MUTATIONS`: name to `mutate(rng, place)`.

Each changes one copy of a real run. What lies beside it, in `place.outside`, belongs to the user.
"""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable

import numpy as np
from etils import epath
from hostile_images import mutated
from hostile_json import hostile_json, hostile_value

from music_jax.checkpoint.integrity import CHECKSUMS, write_checksums


@dataclasses.dataclass(frozen=True)
class Place:
    """The directories of a case.

    Attributes:
      run: A copy of a real run, which is changed.
      outside: What belongs to the user and may not be read by a name from the run, nor changed.
    """

    run: pathlib.Path
    outside: pathlib.Path


_ODD_NAMES = ("\x1b[31mred", "new\nline", "\u202eabc", "\udcff", " ", "a" * 200, "-rf", "9" * 30)


def _files(place: Place) -> list[pathlib.Path]:
    return sorted(path for path in place.run.rglob("*") if path.is_file() and not path.is_symlink())


def _any_name(rng: random.Random, place: Place) -> pathlib.Path:
    """A file or directory of the run, or the name of one that a command would make."""
    made = (
        *("lock", "report.html", "skipped.jsonl", "events.jsonl", "knn.json", "retrieval.json"),
        *("linear_eval.json", "linear_eval.npz", "rewinds.json", "features", "checkpoints"),
        *(
            "compilation_cache",
            "online_probe",
            "damaged",
            "profile",
            ".writable.0",
            "metrics.jsonl",
        ),
    )
    found = [place.run / name for name in made] + sorted(place.run.rglob("*"))
    return rng.choice(found)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)


def fields(rng: random.Random, place: Place) -> None:
    """Other values, keys and forms in a file of JSON."""
    names = [path for path in _files(place) if path.suffix in (".json", ".jsonl")]
    # One file of each name as likely as another; config.json as likely as all others together.
    path = place.run / "config.json"
    if not path.is_file() or rng.random() < 0.5:
        path = rng.choice([rng.choice([p for p in names if p.name == q.name]) for q in names])
    if path.suffix == ".json":
        path.write_bytes(hostile_json(rng, json.loads(path.read_bytes())))
        return
    lines = path.read_bytes().splitlines() or [b"{}"]
    for _ in range(rng.choice((1, 3))):
        at = rng.randrange(len(lines))
        lines[at] = hostile_json(rng, json.loads(lines[at]))
    path.write_bytes(b"\n".join(lines) + b"\n")


_PLACES = (
    ("dataset", "name"),
    ("dataset", "path"),
    ("dataset", "data_dir"),
    ("dataset", "manual_dir"),
    ("evaluation", "train"),
    ("evaluation", "test"),
    ("online_probe", "train"),
    ("dataset", "try_gcs"),
    ("semi_supervised", "lists"),
)


def places(rng: random.Random, place: Place) -> None:
    """A config that names places of the user's, places of its own, and networks."""
    path = place.run / "config.json"
    record = json.loads(path.read_bytes())
    for group, field in rng.sample(_PLACES, rng.randrange(1, 4)):
        if group in record["config"]:
            record["config"][group][field] = rng.choice(
                (
                    str(place.outside),
                    f"{place.outside}/images",
                    f"{place.outside}/new",
                    f"{place.run}/data",
                    "../outside/images",
                    "../../outside/secret",
                    *(
                        "gs://bucket/x",
                        "s3://bucket/x",
                        "http://127.0.0.1:9/x",
                        "hf://x",
                        "cifar10",
                    ),
                    *("digits", "digits:train", "mnist:test", "evil", "coco/2017", "~", "/", "."),
                    *(True, hostile_value(rng)),
                )
            )
    path.write_text(json.dumps(record))


def builders(rng: random.Random, place: Place) -> None:
    """A data_dir in the run whose features.json names a class of a module in the run."""
    (place.run / "payload.py").write_text(f"open({str(place.outside / 'ran')!r}, 'w')\nX = 1\n")
    directory = place.run / "data" / "evil" / "1.0.0"
    directory.mkdir(parents=True)
    name = rng.choice((f"{place.run.name}.payload.X", "payload.X", "os.system", "antigravity.X"))
    (directory / "features.json").write_text(json.dumps({"pythonClassName": name}))
    splits = [{"name": "train", "shardLengths": ["1"], "numBytes": "1"}]
    info = {"name": "evil", "version": "1.0.0", "fileFormat": "array_record", "splits": splits}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    path = place.run / "config.json"
    record = json.loads(path.read_bytes())
    record["config"]["dataset"] |= {"name": "evil", "data_dir": str(place.run / "data")}
    path.write_text(json.dumps(record))


def _target(rng: random.Random, place: Place) -> str:
    return rng.choice(
        (
            *(f"{place.outside}/secret", f"{place.outside}/new", f"{place.outside}/images"),
            *("../outside/secret", "../outside", ".", "..", "nowhere", "/etc/passwd", "/dev/zero"),
            *("/dev/stdin", "/proc/self/environ", "config.json", "checkpoints"),
        )
    )


def links(rng: random.Random, place: Place) -> None:
    """Symbolic links in place of what is there."""
    for _ in range(rng.choice((1, 1, 3))):
        path = _any_name(rng, place)
        _remove(path)
        path.symlink_to(rng.choice((_target(rng, place), path.name)))


def temporary_links(rng: random.Random, place: Place) -> None:
    """Symbolic links under names that files could have while they are written."""
    for _ in range(rng.choice((1, 3, 10))):
        path = _any_name(rng, place)
        names = (f"{path.name}.new", f".{path.name}.new", f"{path.name}.tmp", f"{path.name}.part")
        path = path.with_name(rng.choice(names))
        if not path.is_symlink() and path.parent.is_dir():
            path.symlink_to(_target(rng, place))


def hard_links(rng: random.Random, place: Place) -> None:
    """Names in the run of a file of the user's."""
    for _ in range(rng.choice((1, 3))):
        path = _any_name(rng, place)
        if rng.random() < 0.3:
            path = path.with_name(path.name + ".new")
        _remove(path)
        os.link(place.outside / "secret", path)


def no_files(rng: random.Random, place: Place) -> None:
    """Pipes, sockets, devices and directories in place of files, and files in place of those."""
    path = _any_name(rng, place)
    is_directory = path.is_dir()
    _remove(path)
    kind = rng.randrange(5)
    if kind == 0 or (kind == 3 and os.geteuid() != 0):
        os.mkfifo(path)
    elif kind == 1:
        with socket.socket(socket.AF_UNIX) as server:
            here = os.open(path.parent, os.O_RDONLY)
            try:
                server.bind(f"/proc/self/fd/{here}/{path.name}")
            finally:
                os.close(here)
    elif kind == 2 or (kind == 4 and is_directory):
        path.write_bytes(rng.randbytes(40))
    elif kind == 3:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    else:
        path.mkdir()


def damages(rng: random.Random, place: Place) -> None:
    """Bytes that changed, with the checksums of checkpoints written again or not."""
    path = rng.choice(_files(place))
    path.write_bytes(mutated(rng, path.read_bytes()))
    parts = path.relative_to(place.run).parts
    sealed = parts[0] == "checkpoints" and len(parts) > 2 and path.name != CHECKSUMS
    if sealed and rng.random() < 0.8:
        write_checksums(epath.Path(place.run / parts[0] / parts[1]))


def _npy(shape: object, descr: str, content: bytes) -> bytes:
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def array_bomb(rng: random.Random) -> bytes:
    """An .npy file that says that it is large, or is."""
    return rng.choice(
        (
            _npy((2**40,), "<i8", bytes(8)),
            _npy((2**31,), "<i8", b""),
            _npy((0, 2**62), "<f4", b""),
            _npy((4,), "|O", pickle.dumps([1])),
            _npy((4,), "<U1000000000", b""),
            _npy((-4,), "<i4", bytes(16)),
            _npy((4,), "<i8", struct.pack("<4q", 0, 1, 2, 10**12)),
            _npy((4,), "<i4", struct.pack("<4i", 0, 1, 2, 40_000)),
            _npy((), "<i8", bytes(8)),
            b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(1 << 20),
            b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000,
            bytes(1 << 24),
        )
    )


def bombs(rng: random.Random, place: Place) -> None:
    """Small files that become large, and large ones that take no room on the disk."""
    kind = rng.randrange(4)
    if kind == 0:
        file = io.BytesIO()
        compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name in ("indices", "labels", "predictions", "step", "kernel", "bias"):
                archive.writestr(f"{name}.npy", array_bomb(rng))
        name = rng.choice(("linear_eval.npz", "linear_classifier.npz"))
        (place.run / name).write_bytes(file.getvalue())
    elif kind == 1:
        arrays = sorted((place.run / "features").rglob("*.npz"))
        if arrays:
            with zipfile.ZipFile(rng.choice(arrays), "w", rng.choice((0, 8))) as archive:
                for name in ("features", "embeddings", "labels", "indices"):
                    archive.writestr(f"{name}.npy", array_bomb(rng))
    elif kind == 2:
        # A sparse file: 64 GB of zeros.
        with open(rng.choice(_files(place)), "r+b") as file:
            file.truncate(1 << 36)
    else:
        path = rng.choice([p for p in _files(place) if p.suffix in (".json", ".jsonl")])
        texts = (b"[" * 10**6, b"1" * 400, b'"\\ud800"', b"[" + b"[]," * 10**6 + b"1]")
        text = rng.choice(texts)
        path.write_bytes(rng.choice((b'{"config": %s, "step": 1}\n', b"%s\n")) % text)


def large_labels(rng: random.Random, place: Place) -> None:
    """Predictions of labels that no dataset has, which agree with linear_eval.json."""
    values = [0, 1, 2, rng.choice((39, 40_000, 2**31 - 1, 2**31, 10**12, 2**63 - 1, -1))]
    labels = np.asarray(values, np.int64)
    path = place.run / "linear_eval.json"
    if not path.is_file():
        return
    record = json.loads(path.read_bytes())
    np.savez(
        place.run / "linear_eval.npz",
        indices=np.arange(4),
        labels=labels,
        predictions=labels,
        step=np.asarray(record["step"]),
    )
    path.write_text(json.dumps(record | {"top1": 1.0}))


def names(rng: random.Random, place: Place) -> None:
    """Escape sequences, ends of lines and the like in names of files, metrics, sets and reasons."""
    odd = rng.choice(_ODD_NAMES)
    kind = rng.randrange(4)
    if kind == 0:
        where = rng.choice((place.run, place.run / "checkpoints", place.run / "features"))
        if where.is_dir():
            os.mkdir(os.fsencode(where) + b"/" + odd.encode(errors="surrogateescape"))
    elif kind == 1:
        line = {"source": odd, "image": odd, "reason": odd, "size": 5}
        with open(place.run / "skipped.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    elif kind == 2:
        with open(place.run / "metrics.jsonl", "a") as file:
            keys = ("base64", "shape", "__proto__", "constructor", odd)
            file.write(json.dumps({"step": 10**6, **dict.fromkeys(keys, 1.0)}) + "\n")
    else:
        path = place.run / "config.json"
        record = json.loads(path.read_bytes())
        part = rng.choice(("dataset", "backbone", "objective"))
        record["config"][part]["name"] = odd
        record["versions"] = record["devices"] = {odd: odd}
        path.write_text(json.dumps(record))


def nesting(rng: random.Random, place: Place) -> None:
    """Directories in each other, 1,200 deep."""
    path = rng.choice((place.run, *(p for p in sorted(place.run.rglob("*")) if p.is_dir())))
    here = os.open(path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)


def programs(rng: random.Random, place: Place) -> None:
    """Programs: for JAX's cache, for Python to import, for the dynamic linker to load."""
    for folder in ("compilation_cache", "compiled", ".cache"):
        (place.run / folder).mkdir(exist_ok=True)
        for name in ("jit_extract-00-cache", "xla_gpu_per_fusion_autotune_cache_dir", "x.so"):
            (place.run / folder / name).write_bytes(rng.randbytes(200))
    for name in ("sitecustomize.py", "json.py", "numpy.py", "conftest.py", "config.py"):
        (place.run / name).write_text(f"open({str(place.outside / 'ran')!r}, 'w')\n")
    (place.run / "state.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


MUTATIONS: dict[str, Callable[[random.Random, Place], None]] = {
    "fields": fields,
    "places": places,
    "builders": builders,
    "links": links,
    "temporary links": temporary_links,
    "hard links": hard_links,
    "no files": no_files,
    "damages": damages,
    "bombs": bombs,
    "large labels": large_labels,
    "names": names,
    "nesting": nesting,
    "programs": programs,
}


def mutate(rng: random.Random, place: Place) -> list[str]:
    """Changes a run in one to three ways; returns their names."""
    done = []
    chosen = rng.choices(list(MUTATIONS), k=rng.choice((1, 1, 1, 2, 3)))
    # Nesting comes last, and once: nothing goes through such a run without falling over.
    for name in sorted(set(chosen), key=lambda name: (name == "nesting", name)):
        try:
            MUTATIONS[name](rng, place)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # an earlier one left nothing of what this one changes
        done.append(name)
    return done
