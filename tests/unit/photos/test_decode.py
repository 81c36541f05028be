"""The decoder: correct pixels from each readable kind of file, the correct reason for the others."""

from __future__ import annotations

import io
import time
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pillsnap.photos.decode import BadImage, decode_image, read_header
from pillsnap.synthetic.faults import encode, png_header


@pytest.fixture
def picture() -> np.ndarray:
    rng = np.random.default_rng(5)
    smooth = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (80, 60), interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(smooth)


def test_plain_png_is_exact(picture: np.ndarray) -> None:
    data = encode(Image.fromarray(picture))
    assert read_header(data).plain
    np.testing.assert_array_equal(decode_image(data), picture)


def test_plain_jpeg_equals_pillow_within_rounding(picture: np.ndarray) -> None:
    data = encode(Image.fromarray(picture), "JPEG", quality=95)
    assert read_header(data).plain
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(picture), "JPEG", quality=95, exif=exif)
    turned = decode_image(data)
    expected_shape = (80, 60, 3) if orientation >= 5 else (60, 80, 3)
    header = read_header(data)
    assert turned.shape == expected_shape
    assert (header.height, header.width) == expected_shape[:2]
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}[
        orientation
    ]
    assert np.abs(turned[corner].astype(int) - picture[0, 0]).max() <= 12


def test_other_kinds_become_rgb(picture: np.ndarray) -> None:
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(grey))), np.repeat(grey[..., None], 3, axis=2))

    wide = (grey.astype(np.uint16) << 8) | grey
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(wide))), np.repeat(grey[..., None], 3, axis=2))

    cmyk = decode_image(encode(Image.fromarray(picture).convert("CMYK"), "JPEG", quality=98))
    assert cmyk.shape == picture.shape
    assert np.abs(cmyk.astype(int) - picture).mean() < 4

    sixteen = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR).astype(np.uint16) * 257)[1].tobytes()
    assert np.abs(decode_image(sixteen).astype(int) - picture).max() <= 1


def test_transparency_is_composited_on_white(picture: np.ndarray) -> None:
    alpha = np.zeros(picture.shape[:2], np.uint8)
    alpha[:, :40] = 255
    pixels = decode_image(encode(Image.fromarray(np.dstack([picture, alpha]))))
    np.testing.assert_array_equal(pixels[:, :40], picture[:, :40])
    assert (pixels[:, 40:] == 255).all()

    palette = Image.fromarray(picture).quantize(16)
    data = encode(palette, transparency=bytes([0] + [255] * 15))
    decoded = decode_image(data)
    hidden = np.asarray(palette) == 0
    assert hidden.any()
    assert (decoded[hidden] == 255).all()
    np.testing.assert_array_equal(decoded[~hidden], np.asarray(palette.convert("RGB"))[~hidden])


def test_undecodable_bytes_give_their_reason(picture: np.ndarray) -> None:
    png = encode(Image.fromarray(picture))
    jpeg = encode(Image.fromarray(picture), "JPEG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    taller = png_header(80, 61)[:33] + png[33:]
    narrower = png_header(40, 60)[:33] + png[33:]
    cases = {
        "empty": [b""],
        "not_an_image": [b"just text", b"GIF89a" + b"\0" * 50],
        "truncated": [png[: len(png) // 2], png[:20], jpeg[: len(jpeg) // 2], jpeg[:4], png[:-12]],
        "corrupt": [bytes(flipped), png_header(0, 10), taller, narrower],
        "too_large": [png_header(30_000, 30_000)],
    }
    for reason, files in cases.items():
        for data in files:
            with pytest.raises(BadImage) as caught:
                decode_image(data)
            assert caught.value.reason == reason, (reason, str(caught.value))


def test_a_bomb_is_refused_from_its_header() -> None:
    data = png_header(30_000, 30_000)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(BadImage, match="30000 x 30000"):
        decode_image(data)
    elapsed_s = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert elapsed_s < 0.05
    assert peak < 50e6


def test_bad_image_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(BadImage("empty", "no bytes")))
    assert (error.reason, str(error)) == ("empty", "empty: no bytes")


OTHERS = {
    "WEBP": {"lossless": True, "exact": True}, "BMP": {}, "TIFF": {}, "GIF": {}, "AVIF": {"quality": 100},
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_read_by_content(picture: np.ndarray, kind: str) -> None:
    data = encode(Image.fromarray(picture), kind, **OTHERS[kind])
    header = read_header(data)
    assert (header.width, header.height, header.format) == (80, 60, kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data), expected)
    with pytest.raises(BadImage) as caught:
        decode_image(data, max_pixels=80 * 60 - 1)
    assert caught.value.reason == "too_large"
    with pytest.raises(BadImage):
        decode_image(data[: len(data) // 2])


def test_cut_file_is_refused_where_ultralytics_has_replaced_the_function_of_pillow(picture: np.ndarray) -> None:
    from pillsnap.models.detector import quiet_ultralytics

    quiet_ultralytics()
    import ultralytics.utils.patches

    assert Image.open is ultralytics.utils.patches.image_open
    data = encode(Image.fromarray(picture), "AVIF")
    with pytest.raises(BadImage) as caught:
        decode_image(data[: len(data) // 2])
    assert caught.value.reason == "truncated"


def test_first_frame_of_several_is_read(picture: np.ndarray) -> None:
    first, second = Image.fromarray(picture), Image.fromarray(255 - picture)
    for kind, options in {"GIF": {}, "WEBP": {"lossless": True}, "TIFF": {}, "MPO": {"quality": 95}}.items():
        data = encode(first, kind, save_all=True, append_images=[second], **options)
        assert np.abs(decode_image(data).astype(int) - picture).mean() < 12, kind


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_header_and_decoder_agree_on_orientation(picture: np.ndarray, kind: str, orientation: int, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(picture).convert(mode)
    if kind == "PNG":  # a colour profile of 40 kB precedes the orientation
        data = encode(image, kind, exif=exif, icc_profile=np.random.default_rng(0).bytes(40_000))
    else:
        data = encode(image, kind, exif=exif)
    header, pixels = read_header(data), decode_image(data)
    assert pixels.shape == (header.height, header.width, 3)
    assert (header.width, header.height) == ((60, 80) if orientation >= 5 else (80, 60))
    from PIL import ImageOps

    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.abs(pixels.astype(int) - np.asarray(expected)).max() <= 4


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 40}])
def test_photo_followed_by_a_film_is_a_whole_photo(picture: np.ndarray, options: dict) -> None:
    film = np.random.default_rng(1).bytes(200_000).replace(b"\xff\xd9", b"")
    jpeg = encode(Image.fromarray(picture), "JPEG", **options)
    np.testing.assert_array_equal(decode_image(jpeg + film), decode_image(jpeg))
    png = encode(Image.fromarray(picture))
    np.testing.assert_array_equal(decode_image(png + film), picture)
    for cut in (jpeg[: len(jpeg) // 2] + bytes(200_000), jpeg[:-2], png[:-12] + film):
        with pytest.raises(BadImage, match="truncated"):
            decode_image(cut)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("spoil", ["whole", "film", "half", "last"])
def test_audit_and_training_accept_the_same_files(
    picture: np.ndarray, kind: str, mode: str, spoil: str, tmp_path: Path
) -> None:
    from pillsnap.manifest.audit.files import inspect_photos

    if kind == "JPEG" and mode in ("RGBA", "P"):
        pytest.skip("JPEG has no such mode")
    data = encode(Image.fromarray(picture).convert(mode), kind)
    data = {"whole": data, "film": data + bytes(5000), "half": data[: len(data) // 2], "last": data[:-12]}[spoil]
    (tmp_path / "photo.jpg").write_bytes(data)
    seen = inspect_photos(str(tmp_path), [("photo.jpg", [])], False, 10_000_000)[0]
    try:
        pixels = decode_image(data)
        assert (seen.problem, seen.width, seen.height) == ("", pixels.shape[1], pixels.shape[0])
    except BadImage as error:
        assert seen.problem == error.reason


def test_pixels_of_no_known_range_are_refused() -> None:
    for mode in ("F", "I"):
        for read in (read_header, decode_image):
            with pytest.raises(BadImage, match="no known range"):
                read(encode(Image.new(mode, (8, 8)), "TIFF"))


def test_heic_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadImage, match="not_an_image: HEIC needs a package: pip install pillow-heif"):
        read_header(b"\0\0\0\x18ftypheic" + bytes(100))
