"""Decoding common files compared with Pillow, refusing dangerous ones, and the central view."""

import contextlib
import io
import struct
import tracemalloc

import cv2
import numpy as np
import pytest
import skimage
from PIL import Image, ImageOps

from music_jax.data.decode import MAX_PIXELS, Header, decode, largest_reduction, read_header
from music_jax.errors import UndecodableError

_ORIENTATION = 0x0112


def _photo(height=40, width=61):
    noise = np.random.default_rng(0).random((height, width, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 5)
    return cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def _save(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _turned(orientation):
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    return exif


_RGB = Image.fromarray(_photo())
_ALPHA = Image.fromarray(np.dstack([_photo(), _photo()[..., 0]]))
_CASES = {
    "jpeg": _save(_RGB, "JPEG", quality=95),
    "jpeg_progressive": _save(_RGB, "JPEG", progressive=True),
    "jpeg_gray": _save(_RGB.convert("L"), "JPEG"),
    "jpeg_cmyk": _save(_RGB.convert("CMYK"), "JPEG", quality=95),
    "png": _save(_RGB, "PNG"),
    "png_gray": _save(_RGB.convert("L"), "PNG"),
    "png_alpha": _save(_ALPHA, "PNG"),
    "png_gray_alpha": _save(_ALPHA.convert("LA"), "PNG"),
    "png_palette": _save(_RGB.quantize(64), "PNG"),
    "png_palette_transparent": _save(_RGB.quantize(64), "PNG", transparency=3),
    "png_one_bit": _save(_RGB.convert("1"), "PNG"),
    "webp": _save(_RGB, "WEBP", lossless=True),
    "webp_lossy": _save(_RGB, "WEBP", quality=90),
    "webp_alpha": _save(_ALPHA, "WEBP", lossless=True, exact=True),
    "bmp": _save(_RGB, "BMP"),
    "bmp_palette": _save(_RGB.quantize(64), "BMP"),
    "gif": _save(_RGB.quantize(64), "GIF"),
    "gif_moving": _save(
        _RGB.quantize(64), "GIF", save_all=True, append_images=[Image.new("P", _RGB.size)]
    ),
    **{
        f"jpeg_orientation_{n}": _save(_RGB, "JPEG", quality=95, exif=_turned(n))
        for n in range(1, 9)
    },
    "png_orientation_6": _save(_RGB, "PNG", exif=_turned(6)),
    "webp_orientation_6": _save(_RGB, "WEBP", lossless=True, exif=_turned(6)),
}


@pytest.mark.parametrize("name", _CASES)
def test_colors_match_pillow(name):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(_CASES[name])))
    expected = np.asarray(image.convert("RGB")).astype(int)
    found = decode(_CASES[name], 3)
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("name", _CASES)
def test_grays_match_pillow(name):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(_CASES[name])))
    expected = np.asarray(image.convert("RGB").convert("L")).astype(int)[..., None]
    found = decode(_CASES[name], 1)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 3


def _tiff(*entries, order=">", magic=42):
    """Exif with one directory, of entries (tag, type, count, value)."""
    formats = {1: "B3x", 2: "B3x", 3: "H2x", 4: "I", 7: "B3x", 8: "h2x", 9: "i"}
    packed = b"".join(
        struct.pack(f"{order}HHI{formats[kind]}", tag, kind, count, value)
        for tag, kind, count, value in entries
    )
    mark = b"MM" if order == ">" else b"II"
    return mark + struct.pack(f"{order}HIH", magic, 8, len(entries)) + packed + bytes(4)


def _short(value, order=">"):
    return _tiff((_ORIENTATION, 3, 1, value), order=order)


def _app1(content, before=b"Exif\0\0"):
    return b"\xff\xe1" + struct.pack(">H", len(before + content) + 2) + before + content


def _with_blocks(*blocks, at=2):
    jpeg = _CASES["jpeg"]
    return jpeg[:at] + b"".join(blocks) + jpeg[at:]


_SCAN = _CASES["jpeg"].index(b"\xff\xda")
_OTHERS = [(0xF000 + n, 3, 1, n) for n in range(600)]
_EXIFS = {  # to the orientation that Pillow applies
    **{f"{n} {o}": (_with_blocks(_app1(_short(n, o))), n) for n in (1, 6) for o in "<>"},
    "0": (_with_blocks(_app1(_short(0))), 1),
    "9": (_with_blocks(_app1(_short(9))), 1),
    "6 then 3": (_with_blocks(_app1(_short(6)), _app1(_short(3))), 6),
    "1 then 6": (_with_blocks(_app1(_short(1)), _app1(_short(6))), 1),
    "9 then 6": (_with_blocks(_app1(_short(9)), _app1(_short(6))), 1),
    "none then 6": (_with_blocks(_app1(_tiff((0x0111, 3, 1, 1))), _app1(_short(6))), 1),
    "damaged then 6": (_with_blocks(_app1(b"XX" + _short(3)[2:]), _app1(_short(6))), 1),
    "XMP, then 6": (_with_blocks(_app1(b"<x/>", b"http:"), _app1(_short(6))), 6),
    "in two segments": (_with_blocks(_app1(_short(6)[:12]), _app1(_short(6)[12:])), 6),
    "after the frame": (_with_blocks(_app1(_short(6)), at=_SCAN), 6),
    "behind the image": (_with_blocks(_app1(_short(6)), at=-2), 1),
    "after many entries": (_with_blocks(_app1(_tiff(*_OTHERS, (_ORIENTATION, 3, 1, 6)))), 6),
    "a long number": (_with_blocks(_app1(_tiff((_ORIENTATION, 4, 1, 6)))), 6),
    "signed": (_with_blocks(_app1(_tiff((_ORIENTATION, 8, 1, 6)))), 6),
    "text": (_with_blocks(_app1(_tiff((_ORIENTATION, 2, 1, 6)))), 1),
    "a byte": (_with_blocks(_app1(_tiff((_ORIENTATION, 1, 1, 6), order="<"))), 1),
    "no number": (_with_blocks(_app1(_tiff((_ORIENTATION, 3, 0, 6)))), 1),
    "no TIFF": (_with_blocks(_app1(_tiff((_ORIENTATION, 3, 1, 6), order="<", magic=43))), 1),
    "cut off": (_with_blocks(_app1(_short(6)[:20])), 1),
    "empty": (_with_blocks(_app1(b"")), 1),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged Exif
@pytest.mark.parametrize("name", _EXIFS)
def test_the_exif_orientation_is_applied_as_by_pillow(name):
    jpeg, orientation = _EXIFS[name]
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg)))
    expected = np.asarray(image).astype(int)
    header = read_header(jpeg)
    assert (header.orientation, header[:2]) == (orientation, expected.shape[:2])
    for quick in (False, True):
        found = decode(jpeg, 3, quick=quick)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < (4 if quick else 0.5)
    half = decode(jpeg, 1, reduction=2)
    averaged = np.asarray(image.convert("L").reduce(2)).astype(int)
    assert half.shape[:2] == averaged.shape
    assert np.abs(half[..., 0] - averaged).mean() < 4


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_jpegs_match_opencv_exactly(subsampling, reduction):
    jpeg = _save(_RGB, "JPEG", quality=90, subsampling=subsampling)
    flag = {1: cv2.IMREAD_COLOR} | {n: getattr(cv2, f"IMREAD_REDUCED_COLOR_{n}") for n in (2, 4, 8)}
    expected = cv2.imdecode(np.frombuffer(jpeg, np.uint8), flag[reduction])[..., ::-1]
    assert read_header(jpeg).is_plain
    np.testing.assert_array_equal(decode(jpeg, 3, reduction=reduction), expected)


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("quality", [75, 95, 100])
def test_quick_decoding_differs_by_a_gray_level_or_so_on_average(quality, reduction):
    photo = Image.fromarray(skimage.data.astronaut())
    jpeg = _save(photo, "JPEG", quality=quality)
    accurate, quick = (
        decode(jpeg, 3, reduction=reduction, quick=quick).astype(int) for quick in (False, True)
    )
    assert np.abs(quick - accurate).mean() < 2
    assert np.any(quick != accurate) == (reduction < 4)
    assert np.abs((quick - accurate).mean(axis=(0, 1))).max() < 1.5  # of each color
    for name in ("jpeg_gray", "jpeg_cmyk", "jpeg_orientation_6", "png"):
        np.testing.assert_array_equal(decode(_CASES[name], 3, quick=True), decode(_CASES[name], 3))


def _photo_as_jpeg(**options) -> bytes:
    return _save(Image.fromarray(_photo(120, 176)), "JPEG", quality=95, **options)


def test_a_jpeg_that_is_too_high_is_refused():
    jpeg = bytearray(_save(Image.fromarray(_photo(65_500, 8)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 7] = struct.pack(">H", 65_520)
    with pytest.raises(UndecodableError):
        decode(bytes(jpeg), 3, quick=True)


def test_a_jpeg_that_is_cut_off_near_its_end_is_refused():
    jpeg = _photo_as_jpeg()
    for left in (len(jpeg) - 100, len(jpeg) - 2):
        with pytest.raises(UndecodableError):
            decode(jpeg[:left], 3, quick=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_to_eight(channels):
    values = _photo()[..., :1].astype(np.uint16) * 256 + 77
    png = cv2.imencode(".png", values)[1].tobytes()
    expected = np.repeat(_photo()[..., :1], channels, axis=2)
    np.testing.assert_array_equal(decode(png, channels), expected)


@pytest.mark.parametrize("name", _CASES)
def test_headers_give_the_size_without_decoding(name):
    image = Image.open(io.BytesIO(_CASES[name]))
    is_jpeg, orientation = name.startswith("jpeg"), image.getexif().get(_ORIENTATION, 1)
    width, height = image.size[::-1] if is_jpeg and orientation >= 5 else image.size
    is_plain = is_jpeg and image.mode == "RGB" and orientation == 1
    assert read_header(_CASES[name])[:4] == (height, width, is_jpeg, is_plain)


def test_a_jpeg_with_a_thumbnail_and_fill_bytes_has_its_own_size():
    jpeg, thumbnail = _CASES["jpeg"], _save(_RGB.resize((8, 6)), "JPEG")
    segment = b"\xff\xff\xff\xe2" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail
    assert read_header(jpeg[:2] + segment + jpeg[2:]) == read_header(jpeg)


@pytest.mark.parametrize("name", ["jpeg", "jpeg_progressive", "webp", "bmp", "gif", "png"])
@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.97])
def test_a_file_that_is_cut_off_is_refused(name, part):
    encoded = _CASES[name]
    with pytest.raises(UndecodableError):
        decode(encoded[: int(part * len(encoded))], 3)


def _damaged(kind: str, **options) -> bytes:
    jpeg = _photo_as_jpeg(subsampling="4:2:0", **options)
    middle = jpeg.index(b"\xff\xda") + 1000
    match kind:
        case "a stray marker":
            return jpeg[:middle] + b"\xff\xd0" + jpeg[middle:]
        case "no code":
            return jpeg[:-600] + b"\xff\0" * 8 + jpeg[-600:]
        case "an early end":
            return jpeg[:middle] + jpeg[-2:]
        case "more before the end":
            return jpeg[:-2] + bytes(30) + jpeg[-2:]
    raise ValueError(kind)


@pytest.mark.parametrize(
    ("kind", "progressive"),
    [
        ("a stray marker", False),
        ("no code", False),
        ("an early end", False),
        ("more before the end", False),
        ("more before the end", True),
    ],
)
@pytest.mark.parametrize("reduction", [1, 4])
def test_damaged_jpegs_match_opencv_without_a_line_on_standard_error(
    kind, progressive, reduction, capfd
):
    jpeg = _damaged(kind, progressive=progressive)
    flag = cv2.IMREAD_COLOR if reduction == 1 else cv2.IMREAD_REDUCED_COLOR_4
    expected = cv2.imdecode(np.frombuffer(jpeg, np.uint8), flag)[..., ::-1]
    assert "Corrupt JPEG data" in capfd.readouterr().err
    np.testing.assert_array_equal(decode(jpeg, 3, reduction=reduction), expected)
    assert decode(jpeg, 3, reduction=reduction, quick=True).shape == expected.shape
    assert capfd.readouterr().err == ""


def test_jpegs_that_are_damaged_and_cut_off_are_refused():
    cut_off = _damaged("no code")[:-300]
    skipping = bytearray(_damaged("an early end", progressive=True))
    skipping[-2:] = b"\xff\xfe\xff\xff\xff\xd9"  # a comment that is longer than what follows
    for jpeg in (cut_off, bytes(skipping)):
        with pytest.raises(UndecodableError):
            decode(jpeg, 3)


def test_a_jpeg_without_a_table_that_its_data_need_is_refused():
    jpeg = bytearray(_photo_as_jpeg(subsampling="4:2:0"))
    jpeg[jpeg.index(b"\xff\xda") + 6] = 0x33
    with pytest.raises(UndecodableError):
        decode(bytes(jpeg), 3)


def test_damage_before_the_data_is_treated_as_opencv_does():
    jpeg = _photo_as_jpeg(subsampling="4:2:0")
    tables = jpeg.index(b"\xff\xc4")
    jpeg = jpeg[:tables] + bytes(9) + jpeg[tables:]
    expected = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(decode(jpeg, 3), expected)


@pytest.mark.parametrize("encoded", [b"", b"no image", b"\xff\xd8\xff", b"II*\0" + bytes(60)])
def test_other_files_are_refused(encoded):
    with pytest.raises(UndecodableError):
        decode(encoded, 3)


def test_any_damage_gives_an_image_or_an_undecodable_error():
    rng = np.random.default_rng(0)
    for name in ("jpeg", "jpeg_orientation_6", "png_palette", "webp_lossy", "webp", "bmp", "gif"):
        for _ in range(30):
            damaged = bytearray(_CASES[name])
            for at in rng.integers(0, min(len(damaged), 300), 3):
                damaged[at] = rng.integers(256)
            with contextlib.suppress(UndecodableError):
                assert decode(bytes(damaged), 3).dtype == np.uint8


def _bombs(width, height):
    """Small files whose headers say that they are large."""
    jpeg = bytearray(_CASES["jpeg"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    png = bytearray(_CASES["png"])
    png[16:24] = struct.pack(">II", width, height)
    bmp = bytearray(_CASES["bmp"])
    bmp[18:26] = struct.pack("<ii", width, -height)
    gif = bytearray(_CASES["gif"])
    gif[6:10] = struct.pack("<HH", width, height)
    extended = bytearray(_CASES["webp_orientation_6"])
    extended[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return {"jpeg": jpeg, "png": png, "bmp": bmp, "gif": gif, "webp": extended}


@pytest.mark.parametrize("name", ["jpeg", "png", "bmp", "gif", "webp"])
def test_a_decompression_bomb_is_refused_by_its_header(name):
    encoded = bytes(_bombs(60_000, 50_000)[name])
    tracemalloc.start()
    with pytest.raises(UndecodableError, match="60000 x 50000 pixels, more than"):
        decode(encoded, 3)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_an_image_with_the_largest_number_of_pixels_is_accepted():
    encoded = bytes(_bombs(2**14, MAX_PIXELS // 2**14)["png"])
    assert read_header(encoded) == Header(MAX_PIXELS // 2**14, 2**14)


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_decoded_smaller_is_the_jpeg_averaged(reduction, orientation, channels):
    photo = Image.fromarray(_photo(160, 240))
    encoded = _save(photo, "JPEG", quality=98, exif=_turned(orientation))
    whole = decode(encoded, channels)
    smaller = decode(encoded, channels, reduction=reduction)
    height, width = (side // reduction for side in whole.shape[:2])
    averaged = whole.reshape(height, reduction, width, reduction, channels).mean(axis=(1, 3))
    assert smaller.shape == averaged.shape
    assert np.abs(smaller - averaged).mean() < 1.5
    assert np.abs(smaller - averaged).max() < 8


@pytest.mark.parametrize(
    ("header", "factor", "expected"),
    [
        (Header(9, 9, True), 0.3, 1),
        (Header(9, 9, True), 1.99, 1),
        (Header(9, 9, True), 2.0, 2),
        (Header(9, 9, True), 100.0, 8),
        (Header(9, 9, False), 100.0, 1),
    ],
)
def test_the_reduction_never_exceeds_the_factor(header, factor, expected):
    assert largest_reduction(header, factor) == expected
