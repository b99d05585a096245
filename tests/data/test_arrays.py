"""Images of many channels and types: .npy and TIFF files, and arrays in records."""

import io
import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
import skimage.io
import tifffile
from channel_sets import npy, tiff
from listed_records import list_source
from PIL import Image

from music_jax.data.decode import MAX_PIXELS, decode, read_header
from music_jax.errors import UndecodableError, UnexpectedPixelsError

_BANDS = np.random.default_rng(0).normal(300, 40, (20, 31, 13)).astype(np.float32)
_PLANES = np.ascontiguousarray(_BANDS.transpose(2, 0, 1))
_GRAY = {"photometric": "minisblack"}
_TOGETHER, _APART = _GRAY | {"planarconfig": "contig"}, _GRAY | {"planarconfig": "separate"}

_FILES = {
    "npy": npy(_BANDS),
    "npy of another order": npy(np.asfortranarray(_BANDS)),
    "npy, big-endian": npy(_BANDS.astype(">f4")),
    "npy of version 2": None,  # written below
    "npy of doubles": npy(_BANDS.astype(np.float64)),
    "samples together": tiff(_BANDS, **_TOGETHER),
    "samples apart": tiff(_PLANES, **_APART),
    "compressed": tiff(_BANDS, compression="zlib", **_TOGETHER),
    "compressed apart": tiff(_PLANES, compression="zlib", **_APART),
    "strips": tiff(_BANDS, rowsperstrip=3, **_TOGETHER),
    "tiles": tiff(_BANDS, tile=(16, 16), **_TOGETHER),
    "compressed tiles apart": tiff(_PLANES, tile=(16, 16), compression="zlib", **_APART),
    "BigTIFF, big-endian": tiff(_BANDS, bigtiff=True, byteorder=">", **_TOGETHER),
    "doubles": tiff(_BANDS.astype(np.float64), **_TOGETHER),
    "a page for each channel": tiff(_PLANES),
    "an array of unknown axes": tiff(_BANDS),
    "ImageJ": tiff(_PLANES, imagej=True),
    "OME": tiff(_PLANES, ome=True, metadata={"axes": "CYX"}),
}


def _version_2():
    file = io.BytesIO()
    np.lib.format.write_array(file, _BANDS, version=(2, 0))
    return file.getvalue()


_FILES["npy of version 2"] = _version_2()


@pytest.mark.parametrize("name", _FILES)
def test_thirteen_channels_are_read_from_every_layout(name):
    header = read_header(_FILES[name], 13)
    assert header[:2] == (20, 31)
    image = decode(_FILES[name], 13, dtype=np.float32, header=header)
    np.testing.assert_array_equal(image, _BANDS)
    assert (image.dtype, image.flags.c_contiguous) == (np.float32, True)


def test_a_tiff_of_scikit_image_is_read_as_scikit_image_reads_it(tmp_path):
    image = np.random.default_rng(1).integers(0, 65536, (17, 19, 5), dtype=np.uint16)
    skimage.io.imsave(tmp_path / "bands.tif", image, check_contrast=False)
    content = (tmp_path / "bands.tif").read_bytes()
    expected = skimage.io.imread(tmp_path / "bands.tif")
    np.testing.assert_array_equal(decode(content, 5, dtype=np.uint16), expected)


@pytest.mark.parametrize("kind", ["png", "tif", "npy"])
def test_sixteen_bits_are_kept(kind):
    image = np.random.default_rng(2).integers(0, 65536, (9, 14), dtype=np.uint16)
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, image)
    else:
        Image.fromarray(image).save(file, {"png": "PNG", "tif": "TIFF"}[kind])
    got = decode(file.getvalue(), 1, dtype=np.uint16)
    np.testing.assert_array_equal(got, image[..., None])
    wide = decode(file.getvalue(), 3, dtype=np.float32)
    np.testing.assert_array_equal(wide, np.repeat(image[..., None], 3, axis=2))


def test_four_channels_of_a_png_are_red_green_blue_and_transparency():
    image = np.random.default_rng(3).integers(0, 256, (8, 9, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(image, "RGBA").save(file, "PNG")
    np.testing.assert_array_equal(decode(file.getvalue(), 4), image)
    np.testing.assert_array_equal(decode(file.getvalue(), 3), image[..., :3])


@pytest.mark.parametrize(
    ("found", "wanted", "kept"),
    [
        ("bool", "uint8", True),
        ("uint8", "uint16", True),
        ("uint8", "float32", True),
        ("uint16", "float32", True),
        ("int16", "float32", True),
        ("float16", "float32", True),
        ("int64", "float32", True),
        ("uint16", "uint8", False),
        ("int16", "uint16", False),
        ("float32", "uint16", False),
        ("float32", "uint8", False),
        ("complex64", "float32", False),
    ],
)
def test_types_are_converted_only_where_every_value_is_kept(found, wanted, kept):
    image = np.arange(24).reshape(4, 3, 2).astype(found)
    if not kept:
        with pytest.raises(UnexpectedPixelsError, match=f"values are {found}, not {wanted}"):
            decode(image, 2, dtype=wanted)
        return
    for encoded in (image, npy(image)):
        got = decode(encoded, 2, dtype=wanted)
        assert got.dtype == wanted
        np.testing.assert_array_equal(got, image.astype(wanted))


@pytest.mark.parametrize(
    ("content", "channels", "message"),
    [
        (npy(_BANDS), 3, r"it has 13 channels, not 3.*\[20, 31, 13\]"),
        (npy(_PLANES), 13, r"it has 31 channels, not 13.*\[13, 20, 31\]"),
        (tiff(_BANDS, **_TOGETHER), 4, "it has 13 channels, not 4"),
        (npy(_BANDS[..., 0]), 2, "it has 1 channels, not 2"),
        (cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes(), 13, "JPEG.*not 13"),
        (cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes(), 13, "3 channels, not"),
    ],
)
def test_another_number_of_channels_is_named_with_the_expected_one(content, channels, message):
    with pytest.raises(UnexpectedPixelsError, match=message):
        decode(content, channels, dtype=np.float32)


def _patched(content, **values):
    """Replaces values of tags in a TIFF file of one page."""
    content = bytearray(content)
    with tifffile.TiffFile(io.BytesIO(bytes(content))) as file:
        for name, value in values.items():
            tag = file.pages[0].tags[name]
            struct.pack_into("<HII", content, tag.offset + 2, 4, 1, value)
    return bytes(content)


_BOMB = zlib.compress(bytes(2**28), 9)
_SMALL = tiff(np.zeros((64, 64), np.uint8), compression="zlib", metadata=None)
_PLAIN = tiff(np.zeros((64, 64), np.uint8), metadata=None)
_TILED = tiff(np.zeros((64, 64), np.uint8), tile=(16, 16), compression="zlib", metadata=None)
_HUGE = npy(np.zeros((1, 1, 1), np.uint8)).replace(b"(1, 1, 1)", b"(9, 99999999, 1)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.where(_BANDS > 380, np.nan, _BANDS)), "not finite"),
        (npy(_BANDS.astype(np.float64) * 1e300), "not finite"),
        (_FILES["npy"][:-1], "cut off"),
        (_FILES["npy"][:30], "not a valid .npy file"),
        (npy(_BANDS[None]), r"the shape \[1, 20, 31, 13\]"),
        (npy(_BANDS[:0]), "31 x 0 pixels"),
        (_HUGE.replace(b"(9, 99999999, 1)", b"(2, 2, -13)     "), r"the shape \[2, 2, -13\]"),
        (_HUGE.replace(b"(9, 99999999, 1)", b"(True, 1, 1)    "), r"the shape \[True, 1, 1\]"),
        (npy(np.array([["a"]])), "not numbers"),
        (_HUGE, "cut off|more than"),
        (_FILES["samples together"][:-9], "cannot be decoded"),
        (_FILES["samples together"][:40], "not a valid TIFF"),
        (_patched(_PLAIN, ImageWidth=2**20, ImageLength=2**20), "bytes of pixels"),
        (_patched(_PLAIN, PhotometricInterpretation=3), "not gray with black as 0, RGB"),
        (_patched(_PLAIN, PhotometricInterpretation=0), "not gray with black as 0, RGB"),
        (_patched(_PLAIN, Compression=7), "compression 7"),
        (
            tiff(np.eye(16, dtype=bool), photometric="minisblack", metadata=None),
            "pixels have 1 bit; convert it to PNG",
        ),
        (_patched(_TILED, TileWidth=2**20, TileLength=2**20), "tiles of"),
        (
            _patched(_SMALL, StripOffsets=len(_SMALL), StripByteCounts=len(_BOMB)) + _BOMB,
            "larger than its header says",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_and_dangerous_files_are_refused_in_little_memory(content, message):
    tracemalloc.start()
    with pytest.raises(UndecodableError, match=message):
        decode(content, 13 if b"NUMPY" in content[:8] else 1, dtype=np.float32)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_pickles_are_never_read():
    file = io.BytesIO()
    np.save(file, np.array([[{}]], object))
    with pytest.raises(UndecodableError, match="of type object, not numbers"):
        decode(file.getvalue(), 1)


def test_the_largest_images_are_refused_by_their_header():
    side = MAX_PIXELS // 1000 + 1
    content = npy(np.zeros((1, 1), np.uint8)).replace(b"(1, 1)", b"(1000, %d)" % side)
    with pytest.raises(UndecodableError, match=r"cut off|more than"):
        read_header(content + bytes(1000 * side))


@pytest.mark.parametrize("name", ["samples together", "compressed tiles apart", "ImageJ", "npy"])
def test_no_damage_of_a_byte_raises_anything_else(name):
    rng, content = np.random.default_rng(5), _FILES[name]
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(content)
        first = int(rng.integers(2)) * 200
        for at in rng.integers(first, first + 400, 3):
            damaged[at] = rng.choice([0, 1, 255, int(rng.integers(256))])
        try:
            decode(bytes(damaged), 13, dtype=np.float32)
            outcomes.add("read")
        except UndecodableError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_records_hold_arrays_of_numbers():
    good = (np.zeros((4, 5)), np.zeros((4, 5, 13), np.float32), np.zeros((4, 5, 2), bool))
    source = list_source(
        "arrays", [{"image": image} for image in (*good, np.zeros(4), "text", [1])]
    )
    for i, image in enumerate(good):
        assert source.example(i)[0] is image
    for i in range(len(good), len(source)):
        with pytest.raises(UndecodableError, match="neither an encoded image nor an array"):
            source.example(i)
