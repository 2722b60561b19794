"""Images/s loaded on one core, from class folders and from WebDataset shards, compared with timm's own loader.

    python benchmarks/loading.py IMAGENET_FOLDER --cifar 'CIFAR10/cifar10-train-{000000..000004}.tar'

The folder's images are also written as shards to a temporary folder, so that all loaders load the same images. All loaders
decode and augment in the main process, on one thread, in alternating rounds. A loader's figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import timm.data
import torch
from tqdm import tqdm

from dgnet.bench import describe_hardware, versions
from dgnet.data import TRAIN, ImageDataset, Preprocessing, open_dataset
from dgnet.training import TrainConfig
from dgnet.training._module import ImageDataModule

BATCH = 32


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="class folders of photos")
    parser.add_argument("--cifar", help="shards of CIFAR-10")
    parser.add_argument("--images", type=int, default=512, help="images per round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{describe_hardware('cpu')}; {', '.join(f'{k} {v}' for k, v in versions('cpu').items())}")
    print(f"one core, batch {BATCH}, medians of {args.rounds} rounds of {args.images} images (range)\n")
    print("| images | loader | images/s | range | of timm's |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        shards = write_shards(args.folder, Path(temporary))
        photos = Preprocessing((224, 224), timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
        loaders: dict[str, Callable[[], Iterator[Any]]] = {
            "timm, folder": lambda: timm_loader(str(args.folder), photos, "rrc"),
            "dgnet, folder": lambda: own_loader(str(args.folder), photos, "rrc"),
            "dgnet, shards": lambda: own_loader(shards, photos, "rrc"),
        }
        report("photos at 224, rrc", loaders, args.images, args.rounds)
        if args.cifar:
            small = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
            unpacked = unpack(args.cifar, Path(temporary) / "cifar", 4 * args.images)
            loaders = {
                "timm, folder": lambda: timm_loader(unpacked, small, "pad-crop"),
                "dgnet, folder": lambda: own_loader(unpacked, small, "pad-crop"),
                "dgnet, shards": lambda: own_loader(args.cifar, small, "pad-crop"),
            }
            report("CIFAR-10 at 32, pad-crop", loaders, 4 * args.images, args.rounds)


def own_loader(source: str, preprocessing: Preprocessing, augment: str) -> Iterator[Any]:
    """The loader of a `dgnet train` run."""
    dataset = open_dataset(source, TRAIN)
    dataset.transform = preprocessing.training_transform(augment, 0.5)
    data = ImageDataModule(dataset, dataset, TrainConfig(batch_size=BATCH), preprocessing, folder=Path())
    data.trainer = types.SimpleNamespace(global_rank=0, world_size=1, global_step=0)  # type: ignore[assignment]
    return iter(data.train_dataloader())


def timm_loader(folder: str, preprocessing: Preprocessing, augment: str) -> Iterator[Any]:
    """timm's loader, with dgnet's transform (which includes normalisation)."""
    dataset = timm.data.create_dataset("", root=folder)
    size = (3, *preprocessing.image_size)
    loader = timm.data.create_loader(dataset, size, BATCH, is_training=True, use_prefetcher=False, num_workers=0)
    dataset.transform = preprocessing.training_transform(augment, 0.5)
    return iter(loader)


def report(what: str, loaders: dict[str, Callable[[], Iterator[Any]]], images: int, rounds: int) -> None:
    """Measure the loaders and print their rows of the table."""
    found: dict[str, list[float]] = {name: [] for name in loaders}
    for number in tqdm(range(rounds), desc=what, file=sys.stderr):
        for name in list(loaders) if number % 2 else list(loaders)[::-1]:
            batches = loaders[name]()
            next(batches)
            begin = time.perf_counter()
            count = sum(len(labels) for _, labels in islice(batches, images // BATCH))
            found[name].append(count / (time.perf_counter() - begin))
    of = statistics.median(found["timm, folder"])
    for name, speeds in found.items():
        speed = statistics.median(speeds)
        print(f"| {what} | {name} | {speed:,.0f} | {min(speeds):,.0f} … {max(speeds):,.0f} | {speed / of:.2f} |")


def write_shards(folder: Path, to: Path) -> str:
    """Write the folder's images as one shard; returns its path."""
    return write_shard(open_dataset(str(folder), TRAIN), to / "photos.tar")


def write_shard(dataset: ImageDataset, path: Path) -> str:
    """Write a data set's files, unchanged, into one shard; returns its path."""
    with tarfile.open(path, "w") as tar:
        for index in range(len(dataset)):
            content, label = dataset.read(index)
            for extension, data in (("jpg", content), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{index:06}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


def unpack(shards: str, folder: Path, count: int) -> str:
    """Write the first images of shards into class folders; returns their parent folder."""
    dataset = open_dataset(shards, TRAIN)
    for index in range(count + 2 * BATCH):
        content, label = dataset.read(index)
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        (folder / str(label) / f"{index}.jpg").write_bytes(content)
    return str(folder)


if __name__ == "__main__":
    main()
