"""Computes features of all images of a folder in parts, so that a stopped run can be resumed."""

import contextlib
import hashlib
import json
import logging
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath

from music_jax.data.sources import Source
from music_jax.distributed import progress, usable_cores
from music_jax.errors import UndecodableError, UnusableDataError, UserError, require_extra
from music_jax.exchange.encoder import NO_CODES, Encoder
from music_jax.workdir.files import new_file, parse_json, read_npz, read_record, write_new

_logger = logging.getLogger(__name__)

PART_SIZE = 1024  # images
_MAX_LISTING_BYTES = 1 << 30  # for the names of all images
_STALE = "different images, weights or options, or by an older version of music_jax"


class _Part(NamedTuple):
    """Features of some images."""

    files: list[str]  # names of the images that could be read
    features: np.ndarray  # float32 [files, features]
    codes: np.ndarray  # int32 [files, segments], or [files, 0]
    broken: list[tuple[str, str]]  # name and reason for each of the other images


def encode_folder(encoder: Encoder, source: Source, output: str, *, codes: bool = False) -> str:
    """Writes the features of every image of a source.

    `FILE.npy` holds the features and `FILE.codes.npy` the codes; `FILE.parquet` has the columns
    `file`, `features` and `codes`. `OUTPUT.json` lists the images that could not be read and, for
    npy, the file of each row. Finished parts are kept in `OUTPUT.parts` until all are done; a
    repeated call resumes from them.

    Returns:
      A message about the result.

    Raises:
      UserError: The output has another ending, exists with different images or weights, or cannot
        be written; there are no codes; or the package for Parquet is not installed.
      UnusableDataError: None of the images can be read.
    """
    path = pathlib.Path(output).expanduser()
    if path.suffix not in (".npy", ".parquet"):
        raise UserError(f"--output={output} must end with .npy or .parquet")
    if path.suffix == ".parquet":
        with require_extra("export"):
            import pyarrow.parquet  # noqa: F401  (fail now, not after hours)
    if codes and not encoder.has_codes:
        raise UserError(f"--codes needs {NO_CODES}")
    record: dict[str, Any] = {
        "backbone": encoder.trained.config.backbone.name,
        "step": encoder.trained.step,
        "num_features": encoder.num_features,
        "codes": codes,
        "fingerprint": _fingerprint(encoder, source, codes),
    }
    listing = path.with_name(path.name + ".json")
    if path.exists():
        if _read_record(listing).get("fingerprint") == record["fingerprint"]:
            return f"{output} is done"
        raise UserError(
            f"--output={output} exists and was computed with {_STALE}; choose another path or "
            "remove it"
        )
    try:
        directory = _open_parts(path, record)
        parts, files, broken = _compute_parts(encoder, source, directory, codes)
        if not files:
            raise UnusableDataError(
                f"none of the {len(broken):,} images can be read, such as {': '.join(broken[0])}"
            )
        record["broken"] = [{"file": name, "reason": reason} for name, reason in broken]
        _write_output(path, listing, parts, files, record)
        shutil.rmtree(directory)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from error
    message = f"{output} holds {encoder.num_features} features of {len(files):,} images"
    return message + (f"; {len(broken):,} cannot be read, see {listing}" if broken else "")


def _fingerprint(encoder: Encoder, source: Source, codes: bool) -> str:
    """Returns a hash of the weights, the preprocessing and the images."""
    digest = hashlib.sha256(json.dumps([encoder.trained.description(), codes]).encode())
    for name, tensor in sorted(encoder.trained.tensors.items()):
        digest.update(name.encode() + np.ascontiguousarray(tensor).tobytes())
    digest.update(source.fingerprint(times=True).encode())
    return digest.hexdigest()


def _open_parts(path: pathlib.Path, record: dict[str, Any]) -> pathlib.Path:
    """Returns the directory of the parts, emptied if they do not match the record."""
    directory = path.with_name(path.name + ".parts")
    record_file = directory / "parts.json"
    if directory.is_symlink():
        raise UserError(f"{directory} is a link; remove it")
    if directory.exists() and _read_record(record_file) != record:
        if not record_file.exists() and any(directory.iterdir()):
            raise UserError(f"{directory} exists but is not a resumable `encode` directory")
        _logger.warning(f"{directory} was computed with {_STALE}: starting from the first image")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_new(record_file, json.dumps(record).encode())
    return directory


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    return read_record(epath.Path(path), max_bytes=_MAX_LISTING_BYTES)


def _compute_parts(
    encoder: Encoder, source: Source, directory: pathlib.Path, codes: bool
) -> tuple[list[pathlib.Path], list[str], list[tuple[str, str]]]:
    """Computes missing and damaged parts; returns all paths, names, and images not read."""
    paths: list[pathlib.Path] = []
    files: list[str] = []
    broken: list[tuple[str, str]] = []
    with progress.bar(len(source), unit="img", description="encoding") as bar:
        for start in range(0, len(source), PART_SIZE):
            indices = range(start, min(start + PART_SIZE, len(source)))
            path = directory / f"{start // PART_SIZE:08d}.npz"
            try:
                part = _read_part(path)
                bar.initial += len(indices)  # excluded from the rate
                bar.update(len(indices))
            except (OSError, ValueError):
                part = _compute_part(encoder, source, indices, codes, bar)
                names = json.dumps({"files": part.files, "broken": part.broken}).encode()
                raw = np.frombuffer(names, np.uint8)
                with new_file(path) as file:
                    np.savez(file, features=part.features, codes=part.codes, names=raw)
            paths.append(path)
            files += part.files
            broken += part.broken
    return paths, files, broken


def _compute_part(encoder: Encoder, source: Source, indices: range, codes: bool, bar: Any) -> _Part:
    files: list[str] = []
    broken: list[tuple[str, str]] = []

    def crop(index: int) -> tuple[str, np.ndarray | str]:
        try:
            return source.record_name(index), encoder.crop_file(source.example(index)[0])
        except UndecodableError as error:
            return source.record_name(index), str(error)

    def readable(results: Iterable[tuple[str, np.ndarray | str]]) -> Iterator[np.ndarray]:
        for name, found in results:
            bar.update()
            if isinstance(found, str):
                broken.append((name, found))
            else:
                files.append(name)
                yield found

    with ThreadPoolExecutor(usable_cores()) as pool:
        crops = readable(pool.map(crop, indices))
        outputs = encoder.encode_crops(crops, "codes" if codes else None)
    return _Part(files, *outputs, broken)


def _read_part(file: pathlib.Path) -> _Part:
    """Reads a part; raises OSError if it is missing, and ValueError if it is damaged."""
    arrays = read_npz(file)
    try:
        names = parse_json(arrays["names"].tobytes().decode())
        part = _Part(names["files"], arrays["features"], arrays["codes"], names["broken"])
        if not len(part.files) == len(part.features) == len(part.codes):
            raise ValueError("its arrays have different lengths")
        return part
    except (KeyError, TypeError) as error:
        raise ValueError(f"it lacks {error}") from error


def _write_output(
    path: pathlib.Path,
    listing: pathlib.Path,
    parts: list[pathlib.Path],
    files: list[str],
    record: dict[str, Any],
) -> None:
    """Writes the output, with one part in memory at a time; the requested file appears last."""
    codes = record["codes"]
    if path.suffix == ".npy":
        record = record | {"files": files}
        if codes:
            with new_file(path.with_suffix(".codes.npy")) as file:
                _write_npy(file, len(files), (_read_part(part).codes for part in parts))
    with new_file(path) as file:
        if path.suffix == ".npy":
            _write_npy(file, len(files), (_read_part(part).features for part in parts))
        else:
            _write_parquet(file, map(_read_part, parts), codes)
        write_new(listing, (json.dumps(record, indent=1) + "\n").encode())


def _write_npy(file: IO[bytes], count: int, arrays: Iterator[np.ndarray]) -> None:
    for i, array in enumerate(arrays):
        if i == 0:
            header = np.lib.format.header_data_from_array_1_0(array)
            header |= {"shape": (count, array.shape[1]), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(array.tobytes())


def _write_parquet(file: IO[bytes], parts: Iterable[_Part], codes: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def rows(array: np.ndarray) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])

    with contextlib.ExitStack() as stack:
        writer = None
        for part in parts:
            columns = {"file": pa.array(part.files, pa.string()), "features": rows(part.features)}
            table = pa.table(columns | ({"codes": rows(part.codes)} if codes else {}))
            writer = writer or stack.enter_context(pq.ParquetWriter(file, table.schema))
            writer.write_table(table)
