from __future__ import annotations

import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from dgnet.data import EVALUATION, Preprocessing, ShardStream, open_dataset, open_train_and_evaluation
from dgnet.data._open_stream import _hub_url
from dgnet.errors import UsageError
from dgnet.training import TrainConfig, train
from dgnet.training._loading import TrainingLoader, TrainingOrder
from tests.helpers.data import jpeg, write_shard

CLASSES = [str(label) for label in range(12)]
TRANSFORM = Preprocessing((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).evaluation_transform()


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three shards of four images each, whose labels are 0 to 11."""
    for shard in range(3):
        labels = range(4 * shard, 4 * shard + 4)
        write_shard(tmp_path / f"{shard}.tar", [{"jpg": jpeg(20 * n), "cls": str(n).encode()} for n in labels])
    return tmp_path


def stream(pattern: str, **options: int) -> ShardStream:
    result = ShardStream(pattern, CLASSES, length=12, buffer=options.pop("buffer", 4))
    result.transform = TRANSFORM
    for name, value in options.items():
        setattr(result, name, value)
    return result


def labels(images: ShardStream, count: int) -> list[int]:
    return [label for _, label in islice(images, count)]


def test_a_pipe_is_read_over_and_over_in_new_orders(shards):
    found = labels(stream(f"pipe:cat {shards}/{{0..2}}.tar"), 120)
    counts = Counter(found)
    assert set(counts) == set(range(12))
    assert max(counts.values()) - min(counts.values()) <= 2  # what the buffer holds
    assert found[:12] != found[12:24]
    assert labels(stream(f"pipe:cat {shards}/{{0..2}}.tar"), 24) == found[:24]
    assert labels(stream(f"pipe:cat {shards}/{{0..2}}.tar", seed=1), 24) != found[:24]


def test_a_url_is_read(shards):
    handler = partial(SimpleHTTPRequestHandler, directory=str(shards))
    handler.log_message = lambda *arguments: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = labels(stream(f"http://127.0.0.1:{server.server_port}/{{0..2}}.tar"), 48)
        server.shutdown()
    assert set(found) == set(range(12))


@pytest.mark.parametrize(
    ("ranks", "workers"), [(3, 0), (1, 2), (2, 2)], ids=["by shard", "workers", "fewer shards than workers"]
)
def test_processes_share_the_images(shards, ranks, workers):
    found = []
    for rank in range(ranks):
        images = stream(f"pipe:cat {shards}/{{0..2}}.tar", rank=rank, ranks=ranks, buffer=1)
        loader = iter(DataLoader(images, batch_size=1, num_workers=workers))
        # Each consumer gives four or six images in a pass; two passes of each.
        found += [int(label) for _, label in islice(loader, 24 // ranks)]
    counts = Counter(found)
    assert set(counts) == set(range(12))
    assert set(counts.values()) <= {1, 2, 3}


def test_training_on_a_stream(shards, tmp_path):
    own = {"model_kwargs": {"channels": [4, 4, 4]}, "image_size": 8, "batch_size": 4, "lr": 0.05, "epochs": 2}
    source = f"pipe:cat {shards}/{{0..2}}.tar"
    config = TrainConfig(data=source, val_data=f"{shards}/{{0..2}}.tar", epoch_images=9, output=str(tmp_path / "run"), **own)
    assert train(config).metrics["step"] == 2 * (9 // 4) - 1


def test_a_stream_that_goes_on_begins_elsewhere(shards):
    def first(step: int) -> list[int]:
        order = TrainingOrder(12, 4, seed=0)
        images = stream(f"pipe:cat {shards}/{{0..2}}.tar", buffer=12)
        loader = TrainingLoader(DataLoader(images, batch_size=4), order, lambda: step)
        return [label for _, batch in loader for label in batch.tolist()]

    assert len(first(0)) == len(first(3)) == 12
    assert len(first(4)) == 8  # of the epoch's three steps one was taken
    assert first(0) == first(0)
    assert first(0) != first(3)


def test_what_a_stream_cannot_do(shards):
    source = f"pipe:cat {shards}/0.tar"
    with pytest.raises(UsageError, match=r"has the classes of --val-data; add --val-data SOURCE"):
        open_train_and_evaluation(source, None)
    with pytest.raises(UsageError, match="give the images of an epoch with --epoch-images"):
        open_train_and_evaluation(source, f"{shards}/0.tar")
    with pytest.raises(UsageError, match="from which no images can be held out"):
        open_train_and_evaluation(source, None, holdout=3)
    with pytest.raises(UsageError, match="is a stream, allowed only as --data of training"):
        open_dataset(source, EVALUATION)
    with pytest.raises(UsageError, match="--epoch-images is for streams"):
        open_train_and_evaluation(f"{shards}/0.tar", f"{shards}/0.tar", epoch_images=3)


def test_bad_streams_are_named(shards, tmp_path):
    with pytest.raises(UsageError, match=r"label 4 is out of range, allowed are 0 to 1"):
        labels(ShardStream(f"pipe:cat {shards}/1.tar", CLASSES[:2], length=4), 1)
    write_shard(tmp_path / "unlabelled.tar", [{"jpg": jpeg(0)}])
    with pytest.raises(UsageError, match=r"no label; expected 0000\.cls beside the image"):
        labels(stream(f"pipe:cat {tmp_path}/unlabelled.tar"), 1)
    with pytest.raises(UsageError, match="cannot be read as a stream of a tar file"):
        labels(stream(f"pipe:cat {tmp_path}/nowhere.tar"), 1)
    write_shard(tmp_path / "empty.tar", [])
    with pytest.raises(UsageError, match="no sample for process 1 of 1"):
        labels(stream(f"pipe:cat {tmp_path}/empty.tar"), 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s4://bucket/a.tar", "unknown scheme of a stream 's4'"),
        ("hf://datasets/a.tar", "must be like hf://datasets/USER/NAME/PATH.tar"),
        ("gs://bucket/a.tar", "is read by the command gsutil, which is not installed"),
        ("s3://bucket/a.tar", "is read by the command aws, which is not installed"),
        ("https://nowhere.invalid/a.tar", "is read by the command curl, which is not installed"),
        ("hf://datasets/u/n/a.tar", "is read by the command curl, which is not installed"),
    ],
)
def test_streams_that_nothing_can_read(shards, monkeypatch, source, message):
    monkeypatch.setenv("PATH", str(shards))
    with pytest.raises(UsageError, match=message):
        open_train_and_evaluation(source, f"{shards}/0.tar", epoch_images=4)


def answer(folder: Path, monkeypatch, script: str) -> None:
    """Make `curl` a command that runs `script`."""
    (folder / "bin").mkdir()
    (folder / "bin" / "curl").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "curl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("sleep 100", r"cannot be read: nothing came for 1 seconds"),
        ("echo 'curl: (6) could not resolve host' >&2; exit 6", r"ended with status 6 \(curl: \(6\) could not resolve host\)"),
        ("echo '<html>please log in</html>'", r"is not a tar file; it begins with b'<html>please"),
        ("exit 0", r"is not a tar file; it begins with b''"),
    ],
)
def test_a_stream_is_tried_before_a_run_starts(shards, monkeypatch, script, message):
    answer(shards, monkeypatch, script)
    monkeypatch.setattr("dgnet.data._open_stream.FIRST_PATIENCE", 1.0 if script.startswith("sleep") else 60.0)
    with pytest.raises(UsageError, match=message):
        open_train_and_evaluation("https://nowhere.invalid/a.tar", f"{shards}/0.tar", epoch_images=4)


def test_a_stream_that_stops_is_told(shards, monkeypatch):
    answer(shards, monkeypatch, f"head -c 1000 {shards}/0.tar; sleep 100")
    monkeypatch.setattr("dgnet.data._open_stream.PATIENCE", 0.5)
    with pytest.raises(UsageError, match="cannot be read as a stream of a tar file: nothing came for"):
        labels(stream("https://nowhere.invalid/a.tar"), 1)


def test_the_address_of_a_hub_file(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    address, option = _hub_url("hf://datasets/user/name@v1/folder/a.tar")
    assert address.endswith("/datasets/user/name/resolve/v1/folder/a.tar")
    assert option == 'header = "Authorization: Bearer secret"\n'


def test_a_file_url_is_a_stream_or_shards(shards):
    source = f"file://{shards}/0.tar"
    streamed, _ = open_train_and_evaluation(source, f"{shards}/0.tar", epoch_images=4)
    assert isinstance(streamed, ShardStream)
    streamed.transform, streamed.buffer = TRANSFORM, 1
    assert set(labels(streamed, 8)) <= set(range(4))
    assert len(open_train_and_evaluation(source, source)[0]) == 4
