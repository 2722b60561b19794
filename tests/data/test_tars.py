"""Tar files as they come: odd names and links give their samples or are counted; damaged and forged ones end in one line."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dgnet.data import EVALUATION, TRAIN, ShardStream, open_dataset
from dgnet.data._ledger import Ledger
from dgnet.errors import UsageError
from tests.helpers.data import jpeg, write_folder, write_shard


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def image(name: str, colour: int = 0) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, jpeg(colour))


def label(name: str, number: int = 0) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, str(number).encode())


def write(path: Path, *members: tuple[tarfile.TarInfo, bytes], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def local(path: Path) -> tuple[list[tuple[str, int]], Ledger]:
    """(key, label) of the samples, and the ledger."""
    dataset = open_dataset(str(path), TRAIN)
    keys = [key for _, key, _, _ in dataset.samples]
    for index in range(len(dataset)):
        dataset.load(index)
    return list(zip(keys, dataset.labels, strict=True)), dataset.ledger


def streamed(path: Path) -> tuple[list[tuple[str, int]], Ledger]:
    stream = ShardStream(f"pipe:cat {path}", list(map(str, range(10))), length=1)
    ledgers: list[Ledger] = []
    samples = list(stream._read(stream.paths[0], ledgers.append))
    return [(name.split(", sample ")[1], number) for _, number, name in samples], (ledgers or [Ledger("")])[0]


both = pytest.mark.parametrize("read", [local, streamed])
Read = Callable[[Path], tuple[list[tuple[str, int]], Ledger]]


@both
@pytest.mark.parametrize(
    "keys",
    [
        ("img0001.v2", "img0002"),
        ("2021.05.0001", "2021.05.0002"),
        ("a/b.c/x", "a/b.c/y"),
        ("./x", "x.y/z"),
        ("/photos/x", "/photos/y"),
    ],
)
def test_dotted_keys_lose_no_sample(tmp_path, read: Read, keys):
    path = write(tmp_path / "a.tar", *(f(f"{key}.{kind}") for key in keys for f, kind in ((image, "jpg"), (label, "cls"))))
    assert [key for key, _ in read(path)[0]] == [key.removeprefix("./") for key in keys]


@both
@pytest.mark.parametrize(
    "order", [("x.jpg", "x.seg.png", "x.cls"), ("x.cls", "x.jpg", "x.seg.png"), ("x.seg.png", "x.jpg", "x.cls")]
)
def test_a_mask_is_another_field_of_its_sample(tmp_path, read: Read, order):
    members = [label(name, 1) if name.endswith("cls") else image(name) for name in order]
    samples, ledger = read(write(tmp_path / "a.tar", *members, image("y.jpg"), label("y.cls")))
    assert samples == [("x", 1), ("y", 0)]
    assert ledger.document()["left_out"] == {"other_fields": 1}


@both
def test_the_only_image_of_a_label_is_its_image(tmp_path, read: Read):
    assert read(write(tmp_path / "a.tar", image("x.rgb.png"), label("x.cls", 2), image("y.jpg"), label("y.cls")))[0][0] == (
        "x",
        2,
    )
    two = write(tmp_path / "b.tar", image("x.left.png"), image("x.right.png"), label("x.cls"))
    with pytest.raises(UsageError, match=r"sample x: it has several images, x\.left\.png and x\.right\.png"):
        read(two)


@both
@pytest.mark.parametrize(
    ("second", "line"),
    [
        (image("0.png"), "key 0 has two images, 0.jpg and 0.png; the first is used"),
        (image("0.jpg", 200), "key 0 has two images, 0.jpg and 0.jpg; the first is used"),
        (label("0.cls", 1), "key 0 has two labels, 0.cls and 0.cls (which differ: 0 and 1); the first is used"),
    ],
)
@pytest.mark.parametrize("adjacent", [True, False])
def test_second_files_of_a_key_give_a_line(tmp_path, read: Read, second, line, adjacent):
    rest = [image("1.jpg"), label("1.cls")]
    order = [image("0.jpg"), second, label("0.cls"), *rest] if adjacent and second[0].name != "0.cls" else None
    path = write(tmp_path / "a.tar", *(order or [image("0.jpg"), label("0.cls"), *rest, second]))
    samples, ledger = read(path)
    assert samples == [("0", 0), ("1", 0)]
    assert [warning.partition(": ")[2] for warning in ledger.warnings] == [line]


@both
def test_what_has_no_partner_is_counted(tmp_path, read: Read):
    extra = [label("y.cls"), member("y.txt", b"words"), member("inner.tar", b"x"), member("f.jpg", type=tarfile.FIFOTYPE)]
    samples, ledger = read(write(tmp_path / "a.tar", image("x.jpg"), label("x.cls"), *extra))
    assert samples == [("x", 0)]
    assert ledger.document()["left_out"] == {"other_files": 2, "special": 1, "labels_without_image": 1}


def test_links_inside_a_shard(tmp_path):
    links = [
        member("d/hard.jpg", type=tarfile.LNKTYPE, linkname="d/x.jpg"),
        label("d/hard.cls", 1),
        member("d/soft.jpg", type=tarfile.SYMTYPE, linkname="x.jpg"),
        label("d/soft.cls", 2),
        member("d/gone.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        label("d/gone.cls", 3),
    ]
    path = write(tmp_path / "a.tar", image("d/x.jpg"), label("d/x.cls"), *links)
    samples, ledger = local(path)
    assert sorted(samples) == [("d/hard", 1), ("d/soft", 2), ("d/x", 0)]
    assert ledger.document()["left_out"] == {"links_in_shard": 1, "labels_without_image": 1}
    assert "d/gone.jpg is a link to /etc/passwd, which cannot be followed" in ledger.warnings[0]
    samples, ledger = streamed(path)
    assert samples == [("d/x", 0)]
    assert ledger.document()["left_out"] == {"links_in_shard": 3, "labels_without_image": 3}


def numbered(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header that claims `size` bytes."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(**records: str) -> bytes:
    """A PAX header with these records for the next member."""
    body = b""
    for key, value in records.items():
        length = len(f" {key}={value}\n")
        length += len(str(length + len(str(length))))
        body += f"{length} {key}={value}\n".encode()
    return numbered("pax", len(body), tarfile.XHDTYPE) + body.ljust(-(-len(body) // 512) * 512, b"\0")


END = bytes(1024)


def forged() -> Iterator[tuple[str, bytes, str]]:
    good = numbered("0.jpg", 5) + b"x".ljust(512, b"\0")
    yield "negative size", pax(size="-1024") + numbered("0.jpg", 0) + END, "size of -1,024 bytes|not a readable|as a stream"
    yield (
        "back to the start",
        good + pax(size="-2048") + numbered("1.jpg", 0) + END,
        "size of -2,048 bytes|not a readable|as a stream",
    )
    yield "8 GB in a small file", numbered("0.jpg", 2**33) + END, "cut short|allowed are|as a stream"
    sparse = pax(**{"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**33), "GNU.sparse.name": "0.jpg"}) + numbered("0.jpg", 1)
    yield "sparse", sparse + bytes(512) + END, "with holes"
    yield "long name of 8 GB", numbered("././@LongLink", 2**33, tarfile.GNUTYPE_LONGNAME) + END, "a header of"
    chain = (numbered("././@LongLink", 2, tarfile.GNUTYPE_LONGNAME) + b"x".ljust(512, b"\0")) * 20_000
    yield "chain of long names", chain + good + END, "chain of headers"
    yield "chain of PAX headers", pax(comment="x") * 20_000 + good + END, "chain of headers"
    yield "garbage after a member", good + b"\xff" * 512 + END, "cut short or damaged|not a readable|as a stream"
    yield "no end mark", good, "lacks the end mark|not a readable|as a stream"


@both
@pytest.mark.parametrize(("content", "message"), [case[1:] for case in forged()], ids=[case[0] for case in forged()])
def test_forged_tars_end_in_one_line(tmp_path, read: Read, content, message):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path / "a.tar")
    assert len(str(caught.value)) < 600


def test_a_header_that_claims_the_whole_of_a_huge_file(tmp_path):
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(numbered("././@LongLink", 2**33, tarfile.GNUTYPE_LONGNAME))
        file.truncate(2**34)  # a file with a hole takes no disk space
    with pytest.raises(UsageError, match="a header of 8,589,934,592 bytes"):
        local(tmp_path / "a.tar")


@both
def test_joined_tars_are_told(tmp_path, read: Read):
    one = write(tmp_path / "a.tar", image("x.jpg"), label("x.cls")).read_bytes()
    (tmp_path / "a.tar").write_bytes(one * 2)
    samples, ledger = read(tmp_path / "a.tar")
    assert samples == [("x", 0)]
    assert "what follows the end mark of the tar file is not read" in ledger.warnings[0]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "TAR"])
def test_compressed_shards(tmp_path, kind, suffix):
    path = tmp_path / f"a.{suffix}"
    with tarfile.open(path, f"w:{kind}") as tar:
        for info, content in (image("x.jpg"), label("x.cls")):
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(
        UsageError, match=r"is compressed with \w+, and local shards are read by offset; decompress it \(\w+ -dc"
    ):
        open_dataset(str(path), TRAIN)
    assert streamed(path)[0] == [("x", 0)]


def test_a_damaged_gzip_stream(tmp_path):
    whole = gzip.compress(write(tmp_path / "a.tar", *[image(f"{i}.jpg") for i in range(50)]).read_bytes())
    (tmp_path / "b.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cannot be read as a stream of a tar file"):
        streamed(tmp_path / "b.tar.gz")


@pytest.mark.parametrize("name", ["my.tar", "data.tar.d", "x.target", "x.TAR", "a{1..2}.tar"])
def test_a_folder_is_a_folder_whatever_its_name_is(tmp_path, name):
    root = write_folder(tmp_path / name, {"cat": 1, "dog": 2})
    assert open_dataset(str(root), TRAIN).class_names == ["cat", "dog"]


def test_a_folder_among_shards_is_refused(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.tar").mkdir()
    with pytest.raises(UsageError, match=r"shard .*0\.tar is a folder; expected tar files"):
        open_dataset(str(tmp_path / "{0..1}.tar"), TRAIN)


@pytest.mark.parametrize("name", ["x.TAR", "a b.tar", "data.tar.d.tar", "{x}.tar"])
def test_a_tar_file_is_a_shard_whatever_its_name_is(tmp_path, name):
    path = write_shard(tmp_path / name, [{"jpg": jpeg(0), "cls": b"0"}])
    assert len(open_dataset(str(path), TRAIN)) == 1
    quoted = str(path).replace(" ", "%20").replace("{", "%7B").replace("}", "%7D")
    assert len(open_dataset(f"file://{quoted}", EVALUATION)) == 1


def test_shards_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "f.tar")
    with pytest.raises(UsageError, match=r"f\.tar is not a regular file"):
        open_dataset(str(tmp_path / "f.tar"), TRAIN)
    with pytest.raises(UsageError, match="stands for more than 1,000,000 files"):
        open_dataset(str(tmp_path / "{0..99999999999}.tar"), TRAIN)
    with pytest.raises(UsageError, match="does not exist"):
        open_dataset(str(tmp_path / "data.tar.d" / "x"), TRAIN)
