"""Images for tests: real ones beside the checkout, and small generated ones."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dgnet.data import ImageDataset, Preprocessing

# Beside the checkout, not in it.
SHARED_DATA = Path(os.environ.get("DGNET_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def jpeg(colour: int, size: int = 8) -> bytes:
    """A grey image as JPEG bytes; `colour`: 0 to 255."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (colour, colour, colour)).save(file, "JPEG")
    return file.getvalue()


def write_folder(root: Path, classes: dict[str, int]) -> Path:
    """A data folder. `classes`: from the name of each class folder to its number of images."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index}.jpg").write_bytes(jpeg(10 * index))
    return root


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    """A WebDataset shard. A sample is a dict from file extension to content."""
    with tarfile.open(path, "w") as tar:
        for index, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{index:04}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


class Images(ImageDataset):
    """A data set whose images are tensors in memory."""

    def __init__(self, images: Tensor, labels: list[int], classes: int = 5) -> None:
        self.images, self.labels = images, labels
        self.class_names = [str(label) for label in range(classes)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


class Counted(Images):
    """Appends the index of each loaded image to `loaded`."""

    def __init__(self, images: Tensor, labels: list[int], classes: int = 5) -> None:
        super().__init__(images, labels, classes)
        self.loaded: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.loaded.append(index)
        return super().__getitem__(index)


CLASSES = ["cat", "catfish", '<b>"dog"</b>', "</script><script>owned = 1</script>", "fox 🦊 & co"]
NAMES = [
    "plain.jpg",
    "\"quoted\" and 'single'.jpg",
    "<img src=x onerror='owned = 1'>.jpg",
    "</script><script>owned = 1</script>.jpg",
    "🦊 &amp; <!-- .jpg",
    "half a character \udcff.jpg",
]


class Pictures(ImageDataset):
    """Images of 12×12 pixels, each with another colour. Their names test the escaping of a page. `labels` may hold None."""

    def __init__(self, labels: Sequence[int | None], class_names: Sequence[str] = CLASSES) -> None:
        self.labels = labels
        self.class_names = list(class_names)
        self.transform = Preprocessing((12, 12), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).evaluation_transform()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Any, Any]:
        picture = Image.new("RGB", (12, 12), (37 * index % 256, 91 * index % 256, 173 * index % 256))
        for pixel in range(index % 7 * 12):
            picture.putpixel((pixel % 12, pixel // 12), (255, 20 * index % 256, 0))
        return picture, self.labels[index]

    def name(self, index: int) -> str:
        return f"/home/somebody/photos/{index % 2}/{NAMES[index % len(NAMES)]}"

    def tensor(self, index: int) -> Tensor:
        """The image as the network's input, (1, 3, 12, 12)."""
        return self[index][0][None]
