"""Picture files: what is seen is what was meant, and what can't be seen is refused by name."""

import io
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from hybrid_dist.data import pictures
from hybrid_dist.data.augment import shrink
from hybrid_dist.data.pictures import BACKGROUND, PictureError, read_picture

HEIGHT, WIDTH = 24, 40


@pytest.fixture(scope="module")
def scene():
    """Smooth enough to survive JPEG, and different in each corner and channel."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / 40
    return (255 * np.stack([x, y, 1 - x], -1)).astype(np.uint8)


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def read(folder, data, side=None):
    path = folder / "picture.jpg"
    path.write_bytes(data)
    return read_picture(path, side)


MODES = {
    "JPEG": ["RGB", "L", "CMYK", "1"],
    "PNG": ["RGB", "L", "P", "RGBA", "LA", "1"],
    "WEBP": ["RGB", "L", "P", "RGBA", "LA", "CMYK"],
    "TIFF": ["RGB", "L", "CMYK", "P", "RGBA", "LA", "1"],
    "BMP": ["RGB", "L", "P", "1"],
    "PPM": ["RGB", "L", "1"],
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_every_kind_looks_as_pillow_shows_it(tmp_path, scene, kind, mode):
    """Catches swapped channels, inverted CMYK and a palette's numbers taken for colours."""
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    data = encoded(Image.fromarray(scene).convert(mode), kind, **options)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    pixels = read(tmp_path, data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= 3


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind in ("JPEG", "PNG", "WEBP", "TIFF") for mode in MODES[kind] if mode not in ("P", "1", "LA")],
)
def test_exif_orientation_is_honoured_on_both_paths(tmp_path, scene, kind, mode):
    """Catches phone photographs lying on their side, with OpenCV or with Pillow alone."""
    turned = {2: scene[:, ::-1], 3: scene[::-1, ::-1], 4: scene[::-1], 6: np.rot90(scene, -1), 8: np.rot90(scene)}
    for orientation, seen in turned.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        data = encoded(Image.fromarray(scene).convert(mode), kind, exif=exif)
        expected = np.array(Image.fromarray(np.ascontiguousarray(seen)).convert(mode).convert("RGB")).astype(int)
        pixels = read(tmp_path, data)
        assert pixels.shape == expected.shape
        assert np.abs(pixels - expected).mean() < 8, orientation


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, kind):
    """Catches Pillow's clipping, which makes nearly all of a 16-bit picture white."""
    values = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    pixels = read(tmp_path, encoded(Image.fromarray(values), kind)).astype(int)
    assert np.abs(pixels - (values / 257)[..., None]).max() <= 1


def test_transparent_parts_show_the_background(tmp_path, scene):
    """Catches alpha dropped, which shows whatever colour lies hidden under it; also for a palette's transparency."""
    alpha = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    alpha[:, : WIDTH // 2] = 255
    image = Image.fromarray(np.concatenate([scene, alpha], -1))
    for data in (encoded(image, "PNG"), encoded(image, "WEBP", lossless=True), encoded(image, "TIFF")):
        pixels = read(tmp_path, data)
        assert (pixels[:, : WIDTH // 2] == scene[:, : WIDTH // 2]).all()
        assert (pixels[:, WIDTH // 2 :] == BACKGROUND).all()
    keyed = Image.new("P", (4, 4), 0)
    keyed.putpalette([255, 0, 0, 0, 255, 0])
    keyed.putpixel((0, 0), 1)
    for kind in ("PNG", "GIF"):
        pixels = read(tmp_path, encoded(keyed, kind, transparency=0))
        assert tuple(pixels[0, 0]) == (0, 255, 0)
        assert tuple(pixels[3, 3]) == BACKGROUND


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_an_animation_the_first_frame(tmp_path, scene, kind):
    """Catches the last frame, or a blend of all."""
    frames = [Image.fromarray(scene), Image.fromarray(255 - scene)]
    pixels = read(tmp_path, encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(pixels.astype(int) - scene).mean() < 12


@pytest.fixture(scope="module")
def photograph():
    """(427, 640, 3), with the detail that a camera gives."""
    return load_sample_images().images[0]


@pytest.mark.parametrize("side", [30, 75, 96, 110, 160, 161, 640])
def test_a_reduced_jpeg_is_what_the_whole_one_would_be(tmp_path, photograph, side):
    """Catches a decoding below the size that is needed, channels or a turn lost on the way, detail that is not the
    picture's, or lacks what is: decoded in part or as a whole and shrunk, it differs by few grey levels."""
    for mode, orientation in (("RGB", 1), ("RGB", 6), ("L", 8)):
        exif = Image.Exif()
        exif[0x112] = orientation
        path = tmp_path / "picture.jpg"
        path.write_bytes(encoded(Image.fromarray(photograph).convert(mode), "JPEG", quality=90, exif=exif))
        whole, reduced = read_picture(path), read_picture(path, side)
        assert max(reduced.shape) == {30: 160, 75: 160, 96: 320, 110: 320, 160: 320}.get(side, 640)
        want, have = shrink(whole, side).astype(np.float32), shrink(reduced, side)
        have = cv2.resize(have, want.shape[1::-1]).astype(np.float32)  # a half may be a pixel more
        assert np.abs(want - have).mean() < 4.0
        assert abs((want - have).mean()) < 1.0
        sharp = [np.abs(cv2.Laplacian(pixels, cv2.CV_32F)).mean() for pixels in (want, have)]
        assert 0.8 < sharp[1] / sharp[0] < 1.1, "what clarity is judged by"


@pytest.mark.parametrize("side", [None, 24, 60])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_that_was_cut_off_is_refused(tmp_path, kind, side):
    """Catches the missing part filled with grey, which would pass for an occluded aircraft."""
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for part in (0.1, 0.5, 0.95):
        with pytest.raises(PictureError, match=r"picture\.jpg: is (cut off|no picture)"):
            read(tmp_path, data[: int(len(data) * part)], side)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<html><body>Not found", "is no picture, it starts with b'<html>"),
        (b"", "is no picture: it is empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "is EPS"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "8 or 16 bits"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path, data, reason):
    """Catches an HTML page named .jpg ending the run in a traceback, and PostScript being run."""
    with pytest.raises(PictureError) as caught:
        read(tmp_path, data)
    assert reason in str(caught.value)
    assert "picture.jpg" in str(caught.value)


def test_any_flipped_bit_gives_a_picture_or_its_refusal(tmp_path, scene):
    """Catches a decoder's RuntimeError, struct.error or TypeError that ends a run of hours for one damaged header."""
    exif = Image.Exif()
    exif[0x112] = 6
    image = Image.fromarray(scene)
    for data in (
        encoded(image, "AVIF", exif=exif),
        encoded(image.convert("CMYK"), "JPEG", exif=exif),
        encoded(image.convert("P"), "GIF"),
        encoded(image.convert("RGBA"), "TIFF", compression="tiff_lzw", exif=exif),
        encoded(image.convert("RGBA"), "WEBP", exif=exif),
    ):
        for bit in range(0, 8 * min(len(data), 200), 3):
            place = bit // 8
            damaged = data[:place] + bytes([data[place] ^ 1 << bit % 8]) + data[place + 1 :]
            try:
                assert read(tmp_path, damaged).shape[-1] == 3
            except PictureError:
                continue


def test_a_decompression_bomb_is_refused_unread(tmp_path, monkeypatch):
    """Catches a small file that unpacks to gigabytes, on either side of Pillow's own limits."""
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(PictureError, match="12000 × 12000"):
        read(tmp_path, encoded(Image.new("1", (12000, 12000)), "PNG"))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 99)
    with pytest.raises(PictureError, match="10 × 10 pixels, more than 99"):
        read(tmp_path, encoded(Image.new("RGB", (10, 10)), "JPEG"))


def test_a_missing_file_and_the_way_back_from_a_worker(tmp_path):
    """Catches an error that can't be pickled: the loader process would hang or hide which file it was."""
    with pytest.raises(PictureError, match="No such file") as caught:
        read_picture(tmp_path / "none.jpg")
    back = pickle.loads(pickle.dumps(caught.value))
    assert (str(back), back.path, back.reason) == (str(caught.value), tmp_path / "none.jpg", caught.value.reason)
