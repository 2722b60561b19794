"""What the inputs are made of: a small data set, two runs on it, shards and a COCO file. Made once for each worker."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.fuzz.worker import Worker

CLASSES = ["ant", "bee", "cat"]
QUICK = [
    *("--model-kwargs", "{channels: [4, 4, 4]}", "--image-size", "8", "--batch-size", "4", "--lr", "0.05"),
    *("--threads", "1", "--accelerator", "cpu"),
]


class Bases:
    """Files in `root` that inputs start from."""

    def __init__(self, worker: Worker, root: Path) -> None:
        self.root = root
        draw = np.random.default_rng(0)
        for split, count in (("train", 4), ("val", 3)):
            for place, name in enumerate(CLASSES):
                folder = root / "data" / split / name
                folder.mkdir(parents=True)
                for index in range(count):
                    pixels = draw.integers(60 * place, 60 * place + 80, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{index}.png")
        self.members = [
            (f"{number:03}.{ending}", content)
            for number, path in enumerate(sorted((root / "data" / "val").rglob("*.png")))
            for ending, content in (("png", path.read_bytes()), ("cls", str(CLASSES.index(path.parent.name)).encode()))
        ]
        self._make_coco()
        train = ["train", "--data", str(root / "data"), *QUICK]
        done = worker.run([*train, "--epochs", "1", "--output", str(root / "finished")], root, 120, warms=True)
        assert done.status == 0, done
        half = [*train, "--epochs", "2", "--output", str(root / "half")]
        done = worker.run(half, root, 120, epochs=1)
        assert done.status == 128 + signal.SIGTERM, done
        done = worker.run(["evaluate", str(root / "finished"), "--json"], root, 120, warms=True)
        assert done.status == 0, done

    def _make_coco(self) -> None:
        folder = self.root / "coco"
        folder.mkdir()
        draw = np.random.default_rng(1)
        images = [{"id": id, "file_name": f"{id}.png", "width": 64, "height": 48} for id in range(1, 5)]
        boxes, results = [], []
        for number in range(12):
            left, top, width, height = draw.integers(1, 30, 4).tolist()
            entry = {"image_id": number % 4 + 1, "category_id": (3, 7)[number % 2], "bbox": [left, top, width, height]}
            boxes.append({"id": number + 1, **entry, "area": width * height, "iscrowd": int(number == 5)})
            results.append({**entry, "bbox": [left + 1, top, width, height], "score": 0.9 - number / 20})
        categories = [{"id": 3, "name": "plate"}, {"id": 7, "name": "cell"}]
        document = {"images": images, "annotations": boxes, "categories": categories}
        (folder / "ann.json").write_text(json.dumps(document))
        (folder / "res.json").write_text(json.dumps(results))
        (folder / "images").mkdir()
        for image in images:
            pixels = draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / str(image["file_name"]))

    def fill(self, box: Path, run: str = "finished") -> dict[str, Path]:
        """Copy the files that an input may change to the folder `box`. Returns the path for each name in `@…@`."""
        shutil.copytree(self.root / run, box / "run", ignore=shutil.ignore_patterns("tensorboard"))
        shutil.copytree(self.root / "coco", box / "coco", ignore=shutil.ignore_patterns("images"))
        shutil.copytree(self.root / "data", box / "own")
        (box / "shards").mkdir()
        (box / "shards" / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        with tarfile.open(box / "shards" / "val.tar", "w") as tar:
            for name, content in self.members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        (box / "recipe.yaml").write_text(
            f"data: {self.root}/data\nmodel: dg_resnet20\nmodel_kwargs: {{channels: [4, 4, 4]}}\nimage_size: 8\nbatch_size: 4\n"
            "lr: 0.05\nthreads: 1\naccelerator: cpu\nepochs: 1\noutput: made\n"
        )
        return {
            "box": box,
            "data": self.root / "data",
            "own": box / "own",  # a copy of it
            "image": self.root / "data" / "val" / "ant" / "0.png",
            "images": self.root / "coco" / "images",
            "run": box / "run",
            "safetensors": box / "run" / "model.safetensors",
            "last": box / "run" / "checkpoints" / "last.ckpt",
            "ann": box / "coco" / "ann.json",
            "res": box / "coco" / "res.json",
            "tar": box / "shards" / "val.tar",
            "recipe": box / "recipe.yaml",
        }


def fill_in(word: str, places: dict[str, Path]) -> str:
    """`word` with each `@name@` replaced by its path."""
    return re.sub(r"@(\w+)@", lambda found: str(places.get(found[1], found[0])), word)
