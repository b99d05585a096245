"""Tensors by name, and safetensors files, which hold numbers alone: to read one runs no code."""

import os
from typing import Any

import numpy as np
from etils import epath
from ml_dtypes import bfloat16

from music_jax.errors import UserError
from music_jax.exchange.extras import needs
from music_jax.workdir.files import check_is_file

Tensors = dict[str, np.ndarray]

# Reads a pickle with torch, which is the user's to trust, and writes what it holds of tensors.
CONVERT_COMMAND = (
    'python -c "import sys, torch, safetensors.torch as s; '
    "d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "d = d.get('model', d.get('state_dict', d)); "
    "s.save_file({k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, "
    'sys.argv[2])" FILE.pth FILE.safetensors'
)


# What is read, by its names in these files. Numbers of 8 bits and fewer mean nothing without the
# scales that belong to them, and each program keeps those in a place of its own.
_TYPES = {"F64", "F32", "F16", "BF16", "I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL"}
_MAX_BYTES = 1 << 32  # ten times a backbone of ours with its optimizer's state


def read_safetensors(path: epath.Path) -> tuple[Tensors, dict[str, str]]:
    """Reads the tensors of a file, floating ones as float32, and its metadata.

    Raises:
      UserError: it is not there, no safetensors file, too large, or has tensors of another type.
    """
    with needs("safetensors", "export"):
        from safetensors import SafetensorError, safe_open
    try:
        check_is_file(path)
        with path.open("rb") as file:
            start = file.read(2)
            file.seek(0, os.SEEK_END)
            size = file.tell()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if start in (b"PK", b"\x80\x02"):
        raise UserError(
            f"{path} is a pickle of torch's, which could run code when read and is not opened "
            f"here; where torch is, write its tensors to a safetensors file: {CONVERT_COMMAND}"
        )
    if size > _MAX_BYTES:
        raise UserError(
            f"{path} has {size / 2**30:.1f} GiB, and {_MAX_BYTES >> 30} are read at most; write "
            "the backbone's tensors alone to a file"
        )
    try:
        with safe_open(str(path), framework="np") as file:
            names = list(file.keys())
            for name in names:
                if (kind := file.get_slice(name).get_dtype()) not in _TYPES:
                    raise UserError(
                        f"{path}: {name} is of the type {kind}, which is not read here; write it "
                        "as float32 or bfloat16"
                    )
            tensors = {name: _as_float32(file.get_tensor(name)) for name in names}
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}") from error


def safetensors_bytes(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    """A safetensors file."""
    with needs("safetensors", "export"):
        from safetensors.numpy import save
    return save({name: np.ascontiguousarray(x) for name, x in tensors.items()}, metadata)


def check_shapes(
    tensors: Tensors, expected: dict[str, tuple[int, ...]], where: str, *, strict: bool = True
) -> None:
    """Checks that tensors are those of an architecture.

    Args:
      tensors: by name.
      expected: the shape of each.
      where: what to call them in the message.
      strict: whether there may be no others.

    Raises:
      UserError: one is missing, of another shape or (if strict) unknown.
    """
    wrong = [f"no {name}" for name in expected if name not in tensors]
    wrong += [
        f"{name} of shape {tuple(tensors[name].shape)} in place of {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    wrong += [
        f"{name} of type {tensors[name].dtype} in place of a floating one"
        for name in expected
        if name in tensors and tensors[name].dtype != np.float32
    ]
    if strict:
        wrong += [f"an unknown {name}" for name in tensors if name not in expected]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{where} does not fit the backbone: {'; '.join(wrong[:3])}{more}")


def by_name(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested dictionary by dotted name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= by_name(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _as_float32(tensor: np.ndarray) -> np.ndarray:
    floating = tensor.dtype == bfloat16 or np.issubdtype(tensor.dtype, np.floating)
    return tensor.astype(np.float32) if floating else tensor
