"""Images as they are found: odd ones load, broken ones are named or skipped."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dgnet.checkpoint import load_checkpoint
from dgnet.data import IGNORED, TRAIN, BadImages, Preprocessing, TrainingItems, decode, open_dataset, set_max_pixels
from dgnet.data._images import to_rgb
from dgnet.errors import BadImageError, UsageError
from dgnet.evaluation import evaluate, open_evaluation_data
from dgnet.training import TrainConfig, train

GRADIENT = np.linspace(0, 255, 12 * 16).reshape(12, 16).astype(np.uint8)  # height 12, width 16
PHOTO = np.stack([GRADIENT, GRADIENT.T.reshape(12, 16), 255 - GRADIENT], axis=2)
PREPROCESSING = Preprocessing((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated() -> bytes:
    """A photo taken with the camera on its side: the pixels lie, the tag says which way is up."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    return save(Image.fromarray(PHOTO).transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


ODD: dict[str, Callable[[], tuple[bytes, np.ndarray]]] = {
    "grey": lambda: (save(Image.fromarray(GRADIENT), "PNG"), np.stack([GRADIENT] * 3, axis=2)),
    "16-bit grey": lambda: (
        save(Image.fromarray(GRADIENT.astype(np.uint16) * 257), "PNG"),
        np.stack([GRADIENT] * 3, axis=2),
    ),
    "transparent": lambda: (save(Image.fromarray(PHOTO).convert("RGBA"), "PNG"), PHOTO),
    "animated": lambda: (
        save(Image.fromarray(PHOTO), "PNG", save_all=True, append_images=[Image.new("RGB", (16, 12))]),
        PHOTO,
    ),
    "rotated": lambda: (rotated(), PHOTO),
}
NEAR: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: save(Image.fromarray(PHOTO).convert("CMYK"), "TIFF"),
    "palette": lambda: save(Image.fromarray(PHOTO).quantize(256), "GIF"),
    "palette with transparency": lambda: save(Image.fromarray(PHOTO).quantize(255), "PNG", transparency=bytes(range(255))),
    "broken EXIF": lambda: save(
        Image.fromarray(PHOTO), "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"
    ),
}
BROKEN: dict[str, Callable[[], bytes]] = {
    "truncated": lambda: save(Image.fromarray(PHOTO), "JPEG")[:-100],
    "empty": lambda: b"",
    "text": lambda: b"<html>not found</html>",
    "header only": lambda: save(Image.fromarray(PHOTO), "PNG")[:40],
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_load_as_rgb(kind):
    content, expected = ODD[kind]()
    image = decode(content, kind)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("kind", NEAR)
def test_other_odd_images_load_as_rgb_nearly(kind):
    image = decode(NEAR[kind](), kind)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - PHOTO).mean() < 12


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_are_named(kind):
    with pytest.raises(BadImageError, match=f"{kind} does not decode as an image"):
        decode(BROKEN[kind](), kind)


RAMP = np.linspace(0, 1, 12 * 16, dtype=np.float32).reshape(12, 16)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (RAMP, 255),
        (RAMP * 0.5, 127.5),
        (RAMP * 255, 255),
        (RAMP * 65535, 255),
        ((RAMP * 255).astype(np.int32), 255),
        ((RAMP * 65535).astype(np.int32), 255),
        ((RAMP * 65535).astype(np.uint16), 255),
        (RAMP * 0, 0),
    ],
    ids=["0 to 1", "dark", "0 to 255", "16 bits", "int32, 8 bits", "int32, 16 bits", "uint16", "black"],
)
def test_numbers_are_scaled_by_their_range(values, scale):
    found = np.asarray(decode(save(Image.fromarray(values), "TIFF"), "x.tif")).astype(float)
    assert np.abs(found - np.stack([RAMP * scale] * 3, axis=2)).max() <= 1


@pytest.mark.parametrize(
    "values",
    [RAMP - 0.5, RAMP * 5, RAMP * 1e6, np.where(RAMP < 0.5, RAMP, np.nan), np.where(RAMP < 0.5, RAMP, np.inf)],
    ids=["negative", "a little above 1", "large", "NaN", "infinity"],
)
def test_numbers_of_no_known_range_are_bad_images(values):
    with pytest.raises(BadImageError, match=r"^x\.tif has values from .*, allowed are 0 to 1, 0 to 255 or 0 to 65535"):
        decode(save(Image.fromarray(values.astype(np.float32)), "TIFF"), "x.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_of_pillow_becomes_rgb(mode):
    step = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    photo = Image.fromarray(PHOTO)
    image = to_rgb((photo.convert(step) if step else photo).convert(mode))
    assert image.mode == "RGB"
    assert image.size == photo.size


def test_the_largest_image_is_a_setting(monkeypatch):
    monkeypatch.setenv("DGNET_MAX_PIXELS", "0.0001")
    content = save(Image.fromarray(PHOTO), "PNG")
    with pytest.raises(BadImageError, match=r"^x has 16 × 12 = .*allowed are 0\.0 million pixels; .*--max-pixels"):
        decode(content, "x")
    set_max_pixels(0.001)
    assert decode(content, "x").size == (16, 12)
    set_max_pixels(0.0001, is_default=True)  # what was asked for stays
    assert decode(content, "x").size == (16, 12)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(UsageError, match="--max-pixels must be"):
            set_max_pixels(wrong)


def test_pillows_limit_is_raised_and_named(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    monkeypatch.delenv("DGNET_MAX_PIXELS", raising=False)
    content = save(Image.fromarray(PHOTO), "PNG")
    with pytest.raises(BadImageError, match=r"x has too many pixels \(.*192 pixels.*--max-pixels MEGAPIXELS"):
        decode(content, "x")
    monkeypatch.setenv("DGNET_MAX_PIXELS", "1")
    assert decode(content, "x").size == (16, 12)


def test_an_image_that_is_too_thin_is_bad():
    with pytest.raises(BadImageError, match=r"^x is 5000 × 1 pixels; one side is more than 2,000 times the other"):
        decode(save(Image.new("RGB", (5000, 1)), "PNG"), "x")


@pytest.mark.parametrize(
    "name", ["a\tb.jpg", "a\nb.jpg", "a\rb.jpg", "a\udcffb.jpg", "tab\t and \\.jpg", "plain\\.jpg", " .jpg"]
)
def test_a_bad_image_has_one_line_whatever_its_name_is(tmp_path, name):
    root = tmp_path / "data" / "a"
    root.mkdir(parents=True)
    (root / name).write_bytes(b"no image")
    (root / "good.jpg").write_bytes(save(Image.fromarray(PHOTO), "JPEG"))
    dataset = open_dataset(str(tmp_path / "data"), TRAIN)
    dataset.transform = PREPROCESSING.evaluation_transform()
    bad = BadImages(tmp_path / "bad.txt", limit=1)
    items = TrainingItems(dataset, (3, 8, 8), 0, bad)
    for epoch in range(3):
        for index in range(2):
            items[epoch, index]
    lines = (tmp_path / "bad.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    assert lines[0].count("\t") == 1
    assert len(bad.leave_out(dataset)) == 1


@pytest.mark.parametrize("name", ["plain\\.jpg", "half \udcff.jpg", "é.jpg"])
def test_old_lists_have_names_as_they_are(tmp_path, name):
    root = tmp_path / "data" / "a"
    root.mkdir(parents=True)
    for file in (name, "good.jpg"):
        (root / file).write_bytes(save(Image.fromarray(PHOTO), "JPEG"))
    dataset = open_dataset(str(tmp_path / "data"), TRAIN)
    (tmp_path / "bad.txt").write_bytes(f"{root / name}\tit does not decode\n".encode(errors="surrogateescape"))
    assert len(BadImages(tmp_path / "bad.txt", 1).leave_out(dataset)) == 1


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve odd and broken files among good ones, to train and to evaluate on."""
    contents = [build()[0] for build in ODD.values()] + [build() for build in NEAR.values()]
    contents += [build() for kind, build in BROKEN.items() if kind != "header only"]
    assert len(contents) == 12
    for split in ("train", "val"):
        for name in ("odd", "good"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
        for index, content in enumerate(contents):
            (tmp_path / "data" / split / "odd" / f"{index:02}.jpg").write_bytes(content)
            (tmp_path / "data" / split / "good" / f"{index:02}.jpg").write_bytes(save(Image.fromarray(PHOTO), "JPEG"))
    return tmp_path


def config(folder: Path, **more: object) -> TrainConfig:
    own = {"model_kwargs": {"channels": [4, 4, 4]}, "image_size": 8, "batch_size": 8, "lr": 0.05, "epochs": 2}
    return TrainConfig(data=str(folder / "data"), output=str(folder / "run"), **{**own, **more})


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_counted_and_listed(folder, workers):
    result = train(config(folder, on_bad_image="skip", workers=workers))
    listed = (folder / "run" / "bad_images.txt").read_text().splitlines()
    assert sorted({line.split("\t")[0] for line in listed}) == [
        str(folder / "data" / split / "odd" / f"{index:02}.jpg") for split in ("train", "val") for index in (9, 10, 11)
    ]
    assert len(listed) == 6
    assert result.metrics["val_top1"] * 21 / 100 == pytest.approx(round(result.metrics["val_top1"] * 21 / 100))
    checkpoint = load_checkpoint(folder / "run")
    again = evaluate(checkpoint.build_network(), open_evaluation_data(checkpoint))
    assert (again.images, again.top1) == (21, pytest.approx(result.metrics["val_top1"]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_an_error_by_default(folder, workers):
    with pytest.raises(UsageError, match=r"^\S*odd/\d\d.jpg does not decode as an image \([^\n]*\); replace or remove it$"):
        train(config(folder, workers=workers))
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_too_many_bad_images_end_the_run(folder):
    with pytest.raises(UsageError, match=r"more than 2 images do not decode.*all are listed in .*bad_images.txt"):
        train(config(folder, on_bad_image="skip", max_bad_images=2))
    assert len((folder / "run" / "bad_images.txt").read_text().splitlines()) == 3


def test_what_fills_a_batch_up_counts_in_nothing(folder):
    dataset = open_dataset(str(folder / "data"), TRAIN)
    dataset.transform = PREPROCESSING.evaluation_transform()
    items = TrainingItems(dataset, (3, 8, 8), seed=0, bad=BadImages(folder / "bad.txt", 9))
    image, label = items[0, 12 + 9]
    assert label == IGNORED
    assert not image.any()
    again, _ = items[1, 12 + 9]
    assert (folder / "bad.txt").read_text().count("\n") == 1  # listed once
    padding, label = items[0, -1]
    assert label == IGNORED
    assert torch.equal(padding, again)
