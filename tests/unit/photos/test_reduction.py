"""JPEG photos decoded at a half, a quarter or an eighth of their size: chosen by need, in place, and like the whole."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from pillsnap.photos.decode import BadImage, decode_image, read_header, reduction
from pillsnap.synthetic.faults import encode

CENTRES = np.array([(40.3, 33.7), (150.5, 60.0), (90.0, 140.25), (201.0, 170.8)])
"""x, y of the marks, in pixels of the upright photo."""
SIGMA_PX = 9.0


def marked_photo(width: int, height: int) -> np.ndarray:
    """Round soft marks on grey, (height, width, 3)."""
    y, x = np.mgrid[:height, :width] + 0.5  # of pixel centres
    photo = np.full((height, width), 60.0)
    for left, top in CENTRES:
        photo += 180 * np.exp(-((x - left) ** 2 + (y - top) ** 2) / (2 * SIGMA_PX**2))
    return np.repeat(np.clip(photo, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def found_centres(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Centres of gravity of the marks in a reduced photo, in pixels of the photo."""
    grey = np.clip(pixels[..., 1].astype(float) - 62, 0, None)
    y, x = (np.mgrid[: grey.shape[0], : grey.shape[1]] + 0.5) * factor
    weights = [grey * (np.hypot(x - left, y - top) < 30) for left, top in CENTRES]
    return np.array([((x * weight).sum(), (y * weight).sum()) / weight.sum() for weight in weights])


def jpeg(pixels: np.ndarray, orientation: int = 1, mode: str = "RGB", **options: int) -> bytes:
    """A JPEG that is `pixels` when it is upright."""
    back = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    if orientation > 1:
        exif[0x0112] = orientation
        image = image.transpose(turns[back[orientation]])
    return encode(image.convert(mode), "JPEG", quality=95, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(240, 208), (241, 203), (239, 209)])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_marks_stay_in_place(orientation: int, size: tuple[int, int], factor: int) -> None:
    data = jpeg(marked_photo(*size), orientation)
    chosen = reduction(data, lambda *_: 1 / factor)
    if orientation in (1, 5) or size == (240, 208):
        assert chosen == factor
    else:  # the last pixels of a side would be cut off at its beginning
        assert chosen == 1
    pixels = decode_image(data, reduction=chosen)
    assert pixels.shape == (size[1] // chosen, size[0] // chosen, 3)
    shift = np.abs(found_centres(pixels, chosen) - found_centres(decode_image(data), 1)).max()
    assert shift < 0.1, shift  # half a reduced pixel is 1, 2 or 4


@pytest.mark.parametrize(
    ("mode", "options"), [("RGB", {"progressive": 1}), ("RGB", {"subsampling": 0}), ("L", {}), ("CMYK", {})]
)
def test_every_kind_of_jpeg_is_reduced(mode: str, options: dict[str, int]) -> None:
    data = jpeg(marked_photo(241, 203), mode=mode, **options)
    whole = decode_image(data)
    for factor in (2, 4, 8):
        pixels = decode_image(data, reduction=reduction(data, lambda *_, f=factor: 1 / f))
        assert pixels.shape == (203 // factor, 241 // factor, 3)
        height, width = 203 // factor * factor, 241 // factor * factor
        area = cv2.resize(whole[:height, :width], pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(pixels.astype(int) - area).mean() < 1.0


@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_jpeg_equals_pillow(orientation: int) -> None:
    """Phones store nearly every photo turned: it must be as fast as others, and the same."""
    noise = np.random.default_rng(0).integers(0, 256, (52, 39, 3), dtype=np.uint8)
    data = jpeg(cv2.GaussianBlur(noise, (0, 0), 2), orientation)
    assert read_header(data).plain
    expected = np.asarray(ImageOps.exif_transpose(JpegImageFile(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data), expected)


def test_detail_is_that_of_an_area_average() -> None:
    """PSNR of a textured photo against the whole, reduced by area."""
    rng = np.random.default_rng(1)
    texture = sum(
        cv2.resize(rng.normal(0, 18, (768 // step, 1024 // step, 3)), (1024, 768), interpolation=cv2.INTER_CUBIC)
        for step in (4, 16, 64)
    )
    data = jpeg(np.clip(texture + 128, 0, 255).astype(np.uint8))
    whole = decode_image(data)
    for factor in (2, 4, 8):
        reduced = decode_image(data, reduction=factor).astype(float)
        area = cv2.resize(whole, reduced.shape[1::-1], interpolation=cv2.INTER_AREA)
        psnr_db = 10 * np.log10(255**2 / ((reduced - area) ** 2).mean())

        assert psnr_db > 39, (factor, psnr_db)


def test_reduction_leaves_what_is_needed() -> None:
    data = jpeg(np.zeros((300, 400, 3), np.uint8))
    for scale in np.linspace(0.05, 2, 200):
        factor = reduction(data, lambda *_, s=scale: s)
        assert factor == 1 or factor * scale <= 1
        assert factor == 8 or 2 * factor * scale > 1
    assert reduction(data, lambda width, height: 100 / max(width, height)) == 4
    assert reduction(jpeg(np.zeros((5, 400, 3), np.uint8)), lambda *_: 0.01) == 4  # 5 pixels are no eighth


def test_other_formats_are_never_reduced() -> None:
    for kind in ("PNG", "WEBP", "TIFF", "BMP"):
        assert reduction(encode(Image.new("RGB", (400, 300)), kind), lambda *_: 0.01) == 1


def test_broken_header_is_refused_as_by_the_decoder() -> None:
    data = jpeg(marked_photo(240, 208))[:100]
    with pytest.raises(BadImage, match="truncated"):
        reduction(data, lambda *_: 0.1)
