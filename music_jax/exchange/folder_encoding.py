"""Features of all images of a folder, part by part, so that what was computed is kept."""

import dataclasses
import hashlib
import json
import logging
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
from etils import epath

from music_jax.data.sources import Source
from music_jax.distributed import progress
from music_jax.errors import UndecodableError, UnusableDataError, UserError
from music_jax.exchange.encoder import Encoder, ahead
from music_jax.exchange.extras import needs
from music_jax.workdir.files import new_file, parse_json, read_json, read_npz, write_new

_logger = logging.getLogger(__name__)

ENDINGS = (".npy", ".parquet")
PART_SIZE = 1024  # images

# A view, or why there is none.
_View = np.ndarray | str
_MAX_LISTING_BYTES = 1 << 30  # of the names of all images


@dataclasses.dataclass(frozen=True)
class _Part:
    """What came out of some of the images.

    Attributes:
      files: names of those that could be read.
      features: float32 [files, features].
      codes: int32 [files, segments], or [files, 0].
      broken: name and reason of each of the others.
    """

    files: list[str]
    features: np.ndarray
    codes: np.ndarray
    broken: list[tuple[str, str]]


def encode_folder(encoder: Encoder, source: Source, output: str, *, codes: bool = False) -> str:
    """Writes the features of every image of a source, and what could not be read.

    `FILE.npy` holds features, `FILE.codes.npy` codes; or `FILE.parquet` has the columns `file`,
    `features` and `codes`. `OUTPUT.json` beside it lists the images that could not be read and, for
    npy, the file of each row. The parts computed so far are in `OUTPUT.parts` until all are there;
    the same call goes on from them.

    Args:
      encoder: computes them.
      source: the images.
      output: the file, `.npy` or `.parquet`.
      codes: whether to write codes, too.

    Returns:
      What to say at the end.

    Raises:
      UserError: the output is of another kind, is there from other weights or images, cannot be
        written, there are no codes, or Parquet's package is not installed.
      UnusableDataError: none of the images can be read.
    """
    path = pathlib.Path(output).expanduser()
    if path.suffix not in ENDINGS:
        raise UserError(f"--output={output} must end with {' or '.join(ENDINGS)}")
    if path.suffix == ".parquet":
        with needs("pyarrow", "export"):
            import pyarrow.parquet  # noqa: F401  (before hours of computing, not after)
    if codes and not encoder.has_codes:
        raise UserError(
            "--codes needs the projection head of a run with the objective music; an exported "
            "backbone and other objectives have none"
        )
    record: dict[str, Any] = {
        "backbone": encoder.trained.config.backbone.name,
        "step": encoder.trained.step,
        "num_features": encoder.num_features,
        "codes": codes,
        "fingerprint": _fingerprint(encoder, source, codes),
    }
    listing = path.with_name(path.name + ".json")
    if path.exists():
        if _read_json(listing).get("fingerprint") == record["fingerprint"]:
            return f"{output} is done"
        raise UserError(
            f"--output={output} is there already, from other images or weights; name another"
        )
    try:
        directory = _open_parts(path, record)
        parts = _compute_parts(encoder, source, directory, codes)
        names = [(part.files, part.broken) for part in map(_read_whole, parts)]
        record["broken"] = [
            {"file": name, "reason": reason} for part in names for name, reason in part[1]
        ]
        files = [name for part in names for name in part[0]]
        _check_any(files, record["broken"])
        _write(path, listing, parts, files, record)
        shutil.rmtree(directory)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from error
    broken = len(record["broken"])
    done = f"{output} holds {encoder.num_features} features of {len(files):,} images"
    return done + (f"; {broken:,} cannot be read and are listed in {listing}" if broken else "")


def _compute_parts(
    encoder: Encoder, source: Source, directory: pathlib.Path, codes: bool
) -> list[pathlib.Path]:
    """Computes the parts that are not there yet; gives the files of all, in order."""
    files = []
    with progress.bar(len(source), unit="img", description="encoding") as bar:
        for start in range(0, len(source), PART_SIZE):
            indices = range(start, min(start + PART_SIZE, len(source)))
            file = directory / f"{start // PART_SIZE:08d}.npz"
            if _read_part(file) is None:
                _write_part(file, _encode(encoder, source, indices, codes, bar))
            else:
                bar.initial += len(indices)  # they count in no rate
                bar.update(len(indices))
            files.append(file)
    return files


def _encode(encoder: Encoder, source: Source, indices: range, codes: bool, bar: Any) -> _Part:
    def view(index: int) -> _View:
        try:
            return encoder.view_of(source.example(index)[0])
        except UndecodableError as error:
            return str(error)

    files: list[str] = []
    broken: list[tuple[str, str]] = []
    outputs = []
    views = zip(indices, ahead(view, indices), strict=True)
    while batch := [pair for _, pair in zip(range(encoder.batch_size), views, strict=False)]:
        whole = [(index, found) for index, found in batch if not isinstance(found, str)]
        broken += [
            (source.record_name(index), found) for index, found in batch if isinstance(found, str)
        ]
        if whole:
            files += [source.record_name(index) for index, _ in whole]
            outputs.append(
                encoder.encode_views(np.stack([x for _, x in whole]), "codes" if codes else None)
            )
        bar.update(len(batch))
    width = encoder.trained.config.objective.num_segments if codes else 0
    features = [np.zeros((0, encoder.num_features), np.float32), *(x for x, _ in outputs)]
    found_codes = [np.zeros((0, width), np.int32), *(x for _, x in outputs)]
    return _Part(files, np.concatenate(features), np.concatenate(found_codes), broken)


def _fingerprint(encoder: Encoder, source: Source, codes: bool) -> str:
    """Returns a hash of the weights, the preprocessing and the images."""
    digest = hashlib.sha256(json.dumps([encoder.trained.description(), codes]).encode())
    for name, tensor in sorted(encoder.trained.tensors.items()):
        digest.update(name.encode() + np.ascontiguousarray(tensor).tobytes())
    digest.update(source.fingerprint(times=True).encode())
    return digest.hexdigest()


def _open_parts(path: pathlib.Path, record: dict[str, Any]) -> pathlib.Path:
    """The directory of the parts, without those of other images or weights."""
    directory = path.with_name(path.name + ".parts")
    known = directory / "parts.json"
    if directory.is_symlink():
        raise UserError(f"{directory} is a link; remove it")
    if directory.exists() and _read_json(known) != record:
        if not known.exists() and any(directory.iterdir()):
            raise UserError(f"{directory} is in the way: it holds no parts of features")
        _logger.info(f"{directory} is of other images or weights: starting anew")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_new(known, json.dumps(record).encode())
    return directory


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        record = read_json(epath.Path(path), max_bytes=_MAX_LISTING_BYTES)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _read_part(file: pathlib.Path) -> _Part | None:
    """A part, or None if it is not there or damaged."""
    try:
        arrays = read_npz(file)
        names = parse_json(arrays["names"].tobytes().decode())
        part = _Part(names["files"], arrays["features"], arrays["codes"], names["broken"])
        rows = [(name, "") for name in part.files] + [(name, why) for name, why in part.broken]
        if not all(isinstance(text, str) for row in rows for text in row):
            raise ValueError("its names are no texts")
        for array, dtype in ((part.features, np.float32), (part.codes, np.int32)):
            if array.dtype != dtype or array.ndim != 2 or len(array) != len(part.files):
                raise ValueError("its arrays are of other shapes or types")
        return part
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_whole(file: pathlib.Path) -> _Part:
    part = _read_part(file)
    if part is None:
        raise OSError(f"{file} is damaged")
    return part


def _write_part(file: pathlib.Path, part: _Part) -> None:
    names = json.dumps({"files": part.files, "broken": part.broken}).encode()
    with new_file(file) as opened:
        np.savez(
            opened,
            features=part.features,
            codes=part.codes,
            names=np.frombuffer(names, np.uint8),
        )


def _check_any(files: list[str], broken: list[dict[str, str]]) -> None:
    if not files:
        raise UnusableDataError(
            f"none of the {len(broken):,} images can be read, such as {broken[0]['file']}: "
            f"{broken[0]['reason']}"
        )


def _write(
    path: pathlib.Path,
    listing: pathlib.Path,
    parts: list[pathlib.Path],
    files: list[str],
    record: dict[str, Any],
) -> None:
    """Writes the files, one part in memory at a time; the one that was asked for comes last."""
    if path.suffix == ".npy":
        record = record | {"files": files}
        if record["codes"]:
            with new_file(path.with_suffix(".codes.npy")) as file:
                _write_npy(file, len(files), (_read_whole(part).codes for part in parts))
    with new_file(path) as file:
        if path.suffix == ".npy":
            _write_npy(file, len(files), (_read_whole(part).features for part in parts))
        else:
            _write_parquet(file, map(_read_whole, parts), bool(record["codes"]))
        write_new(listing, (json.dumps(record, indent=1) + "\n").encode())


def _write_npy(file: IO[bytes], count: int, arrays: Iterator[np.ndarray]) -> None:
    for i, array in enumerate(arrays):
        if i == 0:
            header = {
                "descr": np.lib.format.dtype_to_descr(array.dtype),
                "fortran_order": False,
                "shape": (count, array.shape[1]),
            }
            np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(array).tobytes())


def _write_parquet(file: IO[bytes], parts: Iterable[_Part], codes: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def rows(array: np.ndarray) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])

    writer = None
    for part in parts:
        columns = {"file": pa.array(part.files, pa.string()), "features": rows(part.features)}
        table = pa.table(columns | ({"codes": rows(part.codes)} if codes else {}))
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
