"""Computes features of all images of a folder in parts, so that a stopped run can be resumed."""

import contextlib
import hashlib
import json
import logging
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath

from music_jax.data.sources import Source
from music_jax.distributed import progress, usable_cores
from music_jax.distributed.shares import ALL, Share
from music_jax.errors import UndecodableError, UnusableDataError, UserError, require_extra
from music_jax.exchange.encoder import NO_CODES, Encoder
from music_jax.workdir.files import in_bucket, new_file, parse_json, read_npz, read_record

_logger = logging.getLogger(__name__)

PART_SIZE = 1024  # images
_MAX_LISTING_BYTES = 1 << 30  # for the names of all images
# What the directory of parts holds: one directory for each fingerprint, or parts of older versions.
_PARTS = re.compile(r"[0-9a-f]{16}|parts\.json|\d{8}\.npz|\.new-.*")
_STALE = "different images, weights or options, or by an older version of music_jax"


class _Part(NamedTuple):
    """Features of some images."""

    files: list[str]  # names of the images that could be read
    features: np.ndarray  # float32 [files, features]
    codes: np.ndarray  # int32 [files, segments], or [files, 0]
    broken: list[tuple[str, str]]  # name and reason for each of the other images


def encode_folder(
    encoder: Encoder, source: Source, output: str, *, codes: bool = False, share: Share = ALL
) -> str:
    """Writes the features of every image of a source.

    `FILE.npy` holds the features and `FILE.codes.npy` the codes; `FILE.parquet` has the columns
    `file`, `features` and `codes`. `OUTPUT.json` lists the images that could not be read and, for
    npy, the file of each row. Finished parts are kept in `OUTPUT.parts` until all are done; a
    repeated call resumes from them. The call after which no part is missing writes the output.

    Args:
      encoder: Encoder of the images.
      source: Images.
      output: File to write.
      codes: Whether to write the codes too.
      share: The parts that this call computes.

    Returns:
      A message about the result.

    Raises:
      UserError: The output has another ending, exists with different images or weights, or cannot
        be written; there are no codes; or the package for Parquet is not installed.
      UnusableDataError: None of the images can be read.
    """
    if in_bucket(output):
        raise UserError(f"--output={output} must be on a local or shared disk, not in a bucket")
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
    if _is_done(path, listing, record):
        return f"{output} is done"
    try:
        directory = _open_parts(path, record["fingerprint"])
        parts = [directory / f"{k:08d}.npz" for k in range(-(-len(source) // PART_SIZE))]
        _compute_parts(encoder, source, parts, codes, share)
        present = {part.name for part in directory.iterdir()}
        if not all(part.name in present for part in parts):
            return (
                f"share {share} of {output} is done, and others are not; the last one writes the "
                "output"
            )
        num_files, num_broken = _write_output(path, listing, parts, record)
        shutil.rmtree(directory.parent, ignore_errors=True)
    except (OSError, ValueError) as error:
        if _is_done(path, listing, record):  # by another worker in the meantime
            return f"{output} is done"
        raise UserError(f"cannot write {output}: {error}") from error
    message = f"{output} holds {encoder.num_features} features of {num_files:,} images"
    return message + (f"; {num_broken:,} cannot be read, see {listing}" if num_broken else "")


def _is_done(path: pathlib.Path, listing: pathlib.Path, record: dict[str, Any]) -> bool:
    """Returns whether the output exists; raises UserError if it does with another fingerprint."""
    if not path.exists():
        return False
    if _read_record(listing).get("fingerprint") == record["fingerprint"]:
        return True
    raise UserError(
        f"--output={path} exists and was computed with {_STALE}; choose another path or remove it"
    )


def _fingerprint(encoder: Encoder, source: Source, codes: bool) -> str:
    """Returns a hash of the weights, the preprocessing and the images."""
    digest = hashlib.sha256(json.dumps([encoder.trained.description(), codes]).encode())
    for name, tensor in sorted(encoder.trained.tensors.items()):
        digest.update(name.encode() + np.ascontiguousarray(tensor).tobytes())
    digest.update(source.fingerprint(times=True).encode())
    return digest.hexdigest()


def _open_parts(path: pathlib.Path, fingerprint: str) -> pathlib.Path:
    """Returns the directory of the parts with a fingerprint, beside which others may exist."""
    parent = path.with_name(path.name + ".parts")
    directory = parent / fingerprint[:16]
    for path in (parent, directory):
        if path.is_symlink():
            raise UserError(f"{path} is a link; remove it")
    if parent.exists():
        names = [entry.name for entry in parent.iterdir()]
        if not all(map(_PARTS.fullmatch, names)):
            raise UserError(f"{parent} exists but is not a resumable `encode` directory")
        if names and directory.name not in names:
            _logger.warning(f"{parent} was computed with {_STALE}: starting from the first image")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    return read_record(epath.Path(path), max_bytes=_MAX_LISTING_BYTES)


def _compute_parts(
    encoder: Encoder, source: Source, parts: list[pathlib.Path], codes: bool, share: Share
) -> None:
    """Computes the missing and damaged parts of a share."""
    own = share.of(len(parts))
    first, end = (min(k * PART_SIZE, len(source)) for k in (own.start, own.stop))
    with progress.bar(end - first, unit="img", description="encoding") as bar:
        for k in own:
            indices = range(k * PART_SIZE, min((k + 1) * PART_SIZE, len(source)))
            try:
                _read_part(parts[k], encoder.num_features)
                bar.initial += len(indices)  # excluded from the rate
                bar.update(len(indices))
            except (OSError, ValueError):
                part = _compute_part(encoder, source, indices, codes, bar)
                names = json.dumps({"files": part.files, "broken": part.broken}).encode()
                raw = np.frombuffer(names, np.uint8)
                with new_file(parts[k]) as file:
                    np.savez(file, features=part.features, codes=part.codes, names=raw)


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


def _read_part(file: pathlib.Path, num_features: int) -> _Part:
    """Reads a part; raises OSError if it is missing, and ValueError if it is damaged."""
    # In addition to names and codes.
    arrays = read_npz(file, more_bytes=PART_SIZE * num_features * np.dtype(np.float32).itemsize)
    try:
        names = parse_json(arrays["names"].tobytes().decode())
        part = _Part(names["files"], arrays["features"], arrays["codes"], names["broken"])
        if not len(part.files) == len(part.features) == len(part.codes):
            raise ValueError("its arrays have different lengths")
        return part
    except (KeyError, TypeError) as error:
        raise ValueError(f"it lacks {error}") from error


def _write_output(
    path: pathlib.Path, listing: pathlib.Path, parts: list[pathlib.Path], record: dict[str, Any]
) -> tuple[int, int]:
    """Writes the output, with one part in memory at a time; the requested file appears last.

    Returns:
      Numbers of images that could and could not be read.

    Raises:
      OSError, ValueError: A part cannot be read, or the output cannot be written.
      UnusableDataError: None of the images can be read.
    """
    is_npy, count = path.suffix == ".npy", 0
    broken: list[dict[str, str]] = []
    with contextlib.ExitStack() as stack:
        output, names = (stack.enter_context(new_file(file)) for file in (path, listing))
        tables: list[Any] = [
            _Npy("features", output) if is_npy else _Parquet(output, record["codes"])
        ]
        if is_npy and record["codes"]:
            codes = stack.enter_context(new_file(path.with_suffix(".codes.npy")))
            tables.append(_Npy("codes", codes))
        names.write(json.dumps(record, indent=1).removesuffix("\n}").encode())
        names.write(b',\n "files": [' if is_npy else b"")
        for part in (_read_part(file, record["num_features"]) for file in parts):
            for table in tables:
                table.append(part)
            if is_npy:
                lines = [f"\n  {json.dumps(name)}" for name in part.files]
                names.write(("," * (count > 0 < len(lines)) + ",".join(lines)).encode())
            count += len(part.files)
            broken += [{"file": name, "reason": reason} for name, reason in part.broken]
        if not count:
            raise UnusableDataError(
                f"none of the {len(broken):,} images can be read, such as "
                f"{': '.join(broken[0].values())}"
            )
        for table in tables:
            table.close()
        names.write(b"\n ]" if is_npy else b"")
        names.write(f',\n "broken": {json.dumps(broken, indent=1)}\n}}\n'.encode())
    return count, len(broken)


class _Npy:
    """An .npy file that is written part by part."""

    def __init__(self, array: str, file: IO[bytes]):
        self._array, self._file = array, file
        self._header: dict[str, Any] = {}
        self._count = 0

    def append(self, part: _Part) -> None:
        rows = getattr(part, self._array)
        if not self._header:
            self._header = np.lib.format.header_data_from_array_1_0(rows)
            self._write_header(rows.shape)
        self._file.write(rows.tobytes())
        self._count += len(rows)

    def close(self) -> None:
        """Writes the header again, now with the number of rows; its length is the same."""
        self._file.seek(0)
        self._write_header((self._count, *self._header["shape"][1:]))

    def _write_header(self, shape: tuple[int, ...]) -> None:
        header = self._header | {"shape": shape, "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, header)


class _Parquet:
    """A Parquet file that is written part by part."""

    def __init__(self, file: IO[bytes], codes: bool):
        self._file, self._codes = file, codes
        self._writer: Any = None

    def append(self, part: _Part) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        def rows(array: np.ndarray) -> Any:
            return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])

        columns = {"file": pa.array(part.files, pa.string()), "features": rows(part.features)}
        table = pa.table(columns | ({"codes": rows(part.codes)} if self._codes else {}))
        self._writer = self._writer or pq.ParquetWriter(self._file, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        self._writer.close()
