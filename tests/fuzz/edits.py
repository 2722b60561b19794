"""Changes of files, as plain JSON lists `[name, file, …]`, so that an input that fails can be kept as a small file.

A value is a text that is put into the file as it is, so that it need not be valid there. `NEUTRAL` changes say the same as the
file did.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

EDITS: dict[str, Callable[..., None]] = {}
NEUTRAL: set[str] = set()
E = Callable[..., None]


def edit(neutral: bool = False) -> Callable[[E], E]:
    """Register a change under its function's name."""

    def register(function: E) -> E:
        EDITS[function.__name__] = function
        if neutral:
            NEUTRAL.add(function.__name__)
        return function

    return register


def apply(box: Path, change: list[Any]) -> bool:
    """Apply a change below the folder `box`. Returns False if it does not fit, as when another removed the file before."""
    name, file, *values = change
    try:
        EDITS[name](box / file, *values)
    except (OSError, LookupError, ValueError, TypeError, AttributeError, EOFError, tarfile.TarError, RuntimeError):
        return False
    return True


def _place(length: int, where: float) -> int:
    return min(int(where * length), max(length - 1, 0))


# Any file.


@edit()
def flip(path: Path, where: float, bit: int) -> None:
    """Flip a bit at a place from 0 to 1 of the file."""
    content = bytearray(path.read_bytes())
    content[_place(len(content), where)] ^= 1 << bit
    path.write_bytes(content)


@edit()
def cut(path: Path, where: float) -> None:
    """Keep only the first part of the file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(where * len(content))])


@edit()
def insert(path: Path, where: float, text: str) -> None:
    """Insert a text, of which each character is a byte."""
    content = path.read_bytes()
    place = _place(len(content), where)
    path.write_bytes(content[:place] + text.encode("latin-1", "replace") + content[place:])


@edit()
def write(path: Path, text: str) -> None:
    """Replace the content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


@edit()
def delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@edit()
def make_folder(path: Path) -> None:
    """A folder in the place of the file."""
    with contextlib.suppress(FileNotFoundError):
        delete(path)
    (path / "x").mkdir(parents=True)


@edit()
def make_pipe(path: Path) -> None:
    """A named pipe in the place of the file."""
    with contextlib.suppress(FileNotFoundError):
        delete(path)
    os.mkfifo(path)


@edit()
def make_link(path: Path, target: str) -> None:
    """A link in the place of the file."""
    with contextlib.suppress(FileNotFoundError):
        delete(path)
    path.symlink_to(target)


@edit()
def write_bytes(path: Path, text: str) -> None:
    """Replace the content by bytes in hexadecimal digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes.fromhex(text))


@edit()
def rename(path: Path, name: str) -> None:
    """Another name, with a surrogate for a byte that is no UTF-8."""
    os.rename(path, os.fsencode(path.parent) + b"/" + name.encode("utf-8", "surrogateescape"))


@edit()
def copy_to(path: Path, name: str) -> None:
    """A copy beside the file or folder."""
    if path.is_dir():
        shutil.copytree(path, path.parent / name)
    else:
        shutil.copy(path, os.fsencode(path.parent) + b"/" + name.encode("utf-8", "surrogateescape"))


@edit()
def claim_pixels(path: Path, width: int, height: int) -> None:
    """Claim another size in the header of a PNG file."""
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


@edit(neutral=True)
def through_link(path: Path) -> None:
    """The same file through a link."""
    moved = path.with_name(f".moved-{path.name}")  # a hidden name is read by nobody
    path.rename(moved)
    path.symlink_to(moved.name)


@edit(neutral=True)
def add_file(path: Path, text: str) -> None:
    """A further file that nothing refers to."""
    if path.exists():
        raise ValueError
    write(path, text)


# Text.


@edit(neutral=True)
def use_crlf(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))


@edit(neutral=True)
def add_mark(path: Path) -> None:
    """A byte order mark, as Windows' editors write."""
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


@edit()
def recode(path: Path, encoding: str) -> None:
    """Write the text in another encoding."""
    path.write_bytes((path.read_text(encoding="utf-8") + "# é\n").encode(encoding, "replace"))


# YAML.


@edit()
def set_yaml(path: Path, key: str, value: str) -> None:
    """Set a key to a text that is put into the file as it is."""
    lines = _blocks(path.read_text())
    lines[key] = f"{key}: {value}\n"
    path.write_text("".join(lines.values()), errors="surrogatepass")


@edit()
def repeat_yaml(path: Path, key: str, value: str) -> None:
    """Give a key a second time."""
    path.write_text(path.read_text() + f"{key}: {value}\n", errors="surrogatepass")


@edit()
def drop_yaml(path: Path, key: str) -> None:
    lines = _blocks(path.read_text())
    del lines[key]
    path.write_text("".join(lines.values()))


@edit(neutral=True)
def reorder_yaml(path: Path) -> None:
    blocks = _blocks(path.read_text())
    if "".join(blocks.values()) != path.read_text():
        raise ValueError  # it is in another form
    path.write_text("".join(reversed(blocks.values())))


@edit(neutral=True)
def comment_yaml(path: Path) -> None:
    path.write_text("# a comment\n---\n" + path.read_text().replace("\n", "\n\n") + "  # the end\n")


@edit(neutral=True)
def flow_yaml(path: Path) -> None:
    """The same values as JSON."""
    path.write_text(json.dumps(yaml.safe_load(path.read_text()), indent=1))


def _blocks(text: str) -> dict[str, str]:
    """The top-level entries of a YAML file as text, by key."""
    found = re.findall(r"^([\w]+)(:.*\n(?:[ \-].*\n)*)", text, re.MULTILINE)
    return {key: key + rest for key, rest in found}


# JSON.


@edit()
def set_json(path: Path, keys: list[Any], value: str) -> None:
    """Set the item at `keys` to a text that is put into the file as it is."""
    _set_json(path, keys, value)


@edit()
def repeat_json(path: Path, keys: list[Any], value: str) -> None:
    """Give the key at the end of `keys` a second time."""
    _set_json(path, [*keys[:-1], f"{keys[-1]}\0"], value)


def _set_json(path: Path, keys: list[Any], value: str) -> None:
    document = json.loads(path.read_text())
    _item(document, keys[:-1])[keys[-1]] = "\x01HERE"
    text = json.dumps(document).replace("\\u0000", "").replace('"\\u0001HERE"', value)
    path.write_text(text, errors="surrogatepass")


@edit()
def drop_json(path: Path, keys: list[Any]) -> None:
    document = json.loads(path.read_text())
    del _item(document, keys[:-1])[keys[-1]]
    path.write_text(json.dumps(document))


@edit()
def double_json(path: Path, keys: list[Any]) -> None:
    """Append a copy of an item of a list to the list."""
    document = json.loads(path.read_text())
    _item(document, keys[:-1]).append(_item(document, keys))
    path.write_text(json.dumps(document))


@edit(neutral=True)
def indent_json(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3, sort_keys=True) + "\n\n")


@edit(neutral=True)
def add_to_json(path: Path, value: str) -> None:
    """Keys that no reader knows, as other tools write them."""
    document = json.loads(path.read_text())
    for entry in [document] if isinstance(document, dict) else document:
        entry["x_other_tool"] = value
    path.write_text(json.dumps(document))


def _item(document: Any, keys: list[Any]) -> Any:
    for key in keys:
        document = document[key]
    return document


# metrics.csv.


@edit()
def set_cell(path: Path, row: int, column: str, text: str) -> None:
    rows = list(csv.reader(path.read_text().splitlines()))
    rows[row][rows[0].index(column)] = text
    _write_rows(path, rows)


@edit()
def drop_column(path: Path, column: str) -> None:
    rows = list(csv.reader(path.read_text().splitlines()))
    place = rows[0].index(column)
    _write_rows(path, [row[:place] + row[place + 1 :] for row in rows])


@edit()
def drop_row(path: Path, row: int) -> None:
    rows = list(csv.reader(path.read_text().splitlines()))
    del rows[row]
    _write_rows(path, rows)


def _write_rows(path: Path, rows: list[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.write_text(text.getvalue(), errors="surrogatepass")


# Checkpoints. A value is a Python literal, or a call of torch.


@edit()
def set_item(path: Path, keys: list[Any], value: str) -> None:
    """Set the item at `keys` of a checkpoint."""
    content = torch.load(path, weights_only=True)
    _item(content, keys[:-1])[keys[-1]] = literal(value)
    torch.save(content, path)


@edit()
def drop_item(path: Path, keys: list[Any]) -> None:
    content = torch.load(path, weights_only=True)
    del _item(content, keys[:-1])[keys[-1]]
    torch.save(content, path)


@edit(neutral=True)
def save_again(path: Path) -> None:
    """The same content, loaded and saved."""
    torch.save(torch.load(path, weights_only=True), path)


@edit()
def save_old(path: Path) -> None:
    """The same content in the format of torch up to 1.5."""
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)


@edit()
def keep_weights(path: Path) -> None:
    """A bare state dict in torch's old format."""
    state = torch.load(path, weights_only=True)["state_dict"]
    own = {name.removeprefix("network."): tensor for name, tensor in state.items()}
    torch.save(own, path, _use_new_zipfile_serialization=False)


def literal(text: str) -> Any:
    """A Python value from its text."""
    nan, inf = float("nan"), float("inf")
    return eval(text, {"torch": torch, "nan": nan, "inf": inf, "true": True, "false": False, "null": None})


@edit()
def set_header(path: Path, keys: list[Any], value: str) -> None:
    """Set an item of a safetensors file's header to a text that is put into the file as it is."""
    header, rest = _split_header(path)
    _item(header, keys[:-1])[keys[-1]] = "\x01HERE"
    _join_header(path, json.dumps(header).replace('"\\u0001HERE"', value), rest)


@edit()
def set_description(path: Path, keys: list[Any], value: str) -> None:
    """Set an item of the description that a safetensors file carries."""
    header, rest = _split_header(path)
    described = json.loads(header["__metadata__"]["dgnet"])
    _item(described, keys[:-1])[keys[-1]] = "\x01HERE"
    header["__metadata__"]["dgnet"] = json.dumps(described).replace('"\\u0001HERE"', value)
    _join_header(path, json.dumps(header), rest)


@edit()
def claim_header(path: Path, size: int) -> None:
    """Claim another size of a safetensors file's header."""
    path.write_bytes(struct.pack("<Q", size % 2**64) + path.read_bytes()[8:])


def _split_header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _join_header(path: Path, header: str, rest: bytes) -> None:
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)


# Tar files. A member is found by its number.


@edit()
def set_member(path: Path, number: int, field: str, value: str) -> None:
    """Set a field of a member's header; `content` replaces its content."""
    members = _read_members(path)
    member, content = members[number]
    if field == "content":
        content = value.encode("utf-8", "surrogateescape")
        member.size = len(content)
    elif field == "type":
        member.type = value.encode()
    elif field == "pax":
        member.pax_headers = json.loads(value)
    else:
        setattr(member, field, literal(value) if field != "name" and field != "linkname" else value)
    members[number] = (member, content)
    _write_members(path, members)


@edit()
def claim_size(path: Path, number: int, text: str) -> None:
    """Write a text into the size field of a member's header, with a checksum that fits."""
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmembers()[number].offset
    content[start + 124 : start + 136] = text.encode("latin-1", "replace")[:12].ljust(12, b"\0")
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path.write_bytes(content)


@edit()
def double_member(path: Path, number: int) -> None:
    members = _read_members(path)
    _write_members(path, [*members, members[number]])


@edit()
def drop_member(path: Path, number: int) -> None:
    members = _read_members(path)
    del members[number]
    _write_members(path, members)


@edit()
def sparse_member(path: Path, number: int, size: int) -> None:
    """A member that claims to be sparse and `size` bytes long (GNU's format 1.0 in PAX headers)."""
    members = _read_members(path)
    member, content = members[number]
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
    members[number] = (member, f"1\n0\n{size}\n".encode().ljust(512, b"\0") + content)
    member.size = len(members[number][1])
    _write_members(path, members)


@edit(neutral=True)
def labels_last(path: Path) -> None:
    """All images first, then all labels."""
    _write_members(path, sorted(_read_members(path), key=lambda member: member[0].name.endswith(".cls")))


@edit(neutral=True)
def below_folder(path: Path, folder: str) -> None:
    """All members below a folder that has its own entry."""
    members = _read_members(path)
    for member, _ in members:
        member.name = f"{folder}/{member.name}"
    entry = tarfile.TarInfo(folder)
    entry.type = tarfile.DIRTYPE
    _write_members(path, [(entry, b""), *members])


@edit(neutral=True)
def use_format(path: Path, number: int) -> None:
    """Another format of tar: USTAR, GNU or PAX."""
    _write_members(path, _read_members(path), format=number)


def _read_members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as tar:
        return [(member, file.read() if (file := tar.extractfile(member)) else b"") for member in tar.getmembers()]


def _write_members(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content.ljust(min(max(member.size, 0), 2**20), b"\0")))
