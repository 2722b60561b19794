"""The file of a compiled extension: whole or built again, and one line if it cannot be built, stored or loaded."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dgnet import _extension
from dgnet._extension import Extension, build, find_folder, is_whole
from dgnet.errors import UsageError


def compiler(tmp_path, body):
    """The command of a compiler that runs `body`, a shell script, in which $OUT is the file to write."""
    script = tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\nfor OUT; do :; done\n{body}\n", encoding="utf-8")
    script.chmod(0o755)
    return [str(script)]


@pytest.fixture
def library(tmp_path):
    path = tmp_path / "cache" / "dgnet-0.so"
    build(compiler(tmp_path, 'printf "a library" > "$OUT"'), path, "sparse mode")
    return path


def test_a_library_is_stored_alone_and_whole(library):
    assert is_whole(library)
    assert library.read_bytes().startswith(b"a library\n")
    assert list(library.parent.iterdir()) == [library]


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_part_of_a_library_is_not_whole(library, keep):
    content = library.read_bytes()
    library.write_bytes(content[: int(keep * len(content))])
    assert not is_whole(library)


def test_other_damage_is_noticed_too(library, tmp_path):
    content = library.read_bytes()
    library.write_bytes(b"A" + content[1:])
    assert not is_whole(library)
    library.write_bytes(b"from an older version, without a checksum")
    assert not is_whole(library)
    library.write_bytes(content + content)
    assert not is_whole(library)
    assert not is_whole(tmp_path)
    assert not is_whole(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("echo 'native.cpp:1: error: no such thing' >&2; exit 1", "native.cpp:1: error: no such thing"),
        ("echo several; echo lines; exit 3", "cannot be built: lines"),
        ("exit 7", "cannot be built: exit status 7"),
        ("kill -9 $$", "cannot be built: exit status -9"),
        ("true", "cannot be built: No such file or directory"),  # it writes nothing
        ("head -c 9999 /dev/zero | tr '\\0' '\\377' >&2; exit 1", "cannot be built: \ufffd"),
    ],
)
def test_a_compiler_that_fails(body, line, tmp_path):
    with pytest.raises(UsageError) as error:
        build(compiler(tmp_path, body), tmp_path / "cache" / "a.so", "sparse mode")
    assert line in str(error.value)
    assert len(str(error.value)) < 500
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(_extension, "_SECONDS", 0.1)
    with pytest.raises(UsageError, match=r"compiler has not ended after 0\.1 seconds; name another compiler in CXX"):
        build(compiler(tmp_path, "sleep 60 & sleep 60"), tmp_path / "cache" / "a.so", "sparse mode")


@pytest.mark.parametrize("command", ["missing", "folder", "text"])
def test_a_compiler_that_cannot_be_run(command, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no program")
    with pytest.raises(UsageError, match=f"cannot be built: .*{command}.*; name another folder in TORCH_EXTENSIONS_DIR"):
        build([str(tmp_path / command)], tmp_path / "cache" / "a.so", "sparse mode")


def test_places_where_nothing_can_be_stored(tmp_path):
    work = compiler(tmp_path, 'echo > "$OUT"')
    (tmp_path / "file").touch()
    (tmp_path / "a.so").mkdir()
    for path in (tmp_path / "file" / "a.so", tmp_path / ("a" * 300) / "a.so"):
        with pytest.raises(
            UsageError, match=r"cannot be built: .*; name another folder in TORCH_EXTENSIONS_DIR|File name too long"
        ):
            build(work, path, "sparse mode")
    with pytest.raises(UsageError, match=r"a\.so is a folder; remove it"):
        build(work, tmp_path / "a.so", "sparse mode")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UsageError, match="cannot be built: Permission denied"):
        build(["true"], tmp_path / "a.so", "sparse mode")


def test_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for value, folder in (("", ".cache/torch_extensions"), ("~/own", "own"), ("relative", "relative"), ("./a", "a")):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", value)
        assert find_folder("sparse mode") == tmp_path / folder
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "~nobody-of-this-name/own")
    with pytest.raises(UsageError, match=r"has no folder: .*; name one in TORCH_EXTENSIONS_DIR"):
        find_folder("sparse mode")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache folder of this test."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def extension(tmp_path):
    """An extension of two files, which counts as defined."""
    sources = (tmp_path / "part.cpp", tmp_path / "part.h")
    for source in sources:
        source.write_text("int answer();", encoding="utf-8")
    return Extension("part", "sparse mode", "a minute", sources, lambda: True)


def test_a_cut_library_is_built_again_before_it_is_loaded(own_cache, extension, tmp_path, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: loaded.append(path.read_bytes()))
    monkeypatch.setenv("CXX", compiler(tmp_path, 'printf "a library" > "$OUT"')[0])
    extension.load()
    (library,) = own_cache.iterdir()
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    _extension._try_to_build.cache_clear()
    extension.load()
    extension.load()
    assert loaded == [whole] * 3
    assert capsys.readouterr().err.count("compiling the sparse mode, once on this machine: about a minute") == 2


def test_a_failure_is_remembered(own_cache, extension, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, f"echo once >> {tmp_path}/runs; exit 1")[0])
    for _ in range(3):
        with pytest.raises(UsageError, match="cannot be built"):
            extension.load()
    assert (tmp_path / "runs").read_text() == "once\n"


@pytest.mark.parametrize("content", ["no library", ""])
def test_a_file_that_is_no_library(content, own_cache, extension, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, f'printf "{content}" > "$OUT"')[0])
    with pytest.raises(UsageError, match=r"\.so cannot be loaded: .*; remove the file, and it will be built again"):
        extension.load()


def test_a_library_without_the_extension(own_cache, extension, tmp_path, monkeypatch):
    extension = replace(extension, is_defined=lambda: False)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setenv("CXX", compiler(tmp_path, 'printf "a library" > "$OUT"')[0])
    with pytest.raises(UsageError, match="cannot be loaded: it does not define the extension"):
        extension.load()


def test_two_processes_may_build_at_once(tmp_path):
    """Each compiler waits until both run; each then writes its own file, and one of the two whole files stays."""
    path = tmp_path / "cache" / "a.so"
    meet = 'touch "%s/$$"; until [ "$(ls %s | wc -l)" -ge 2 ]; do sleep 0.01; done; printf "a library" > "$OUT"'
    (tmp_path / "running").mkdir()
    command = compiler(tmp_path, meet % (tmp_path / "running", tmp_path / "running"))
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(build, command, path, "sparse mode") for _ in range(2)]:
            done.result(timeout=60)
    assert is_whole(path)
    assert list(path.parent.iterdir()) == [path]


def test_a_library_that_was_built_before_needs_no_compiler(own_cache, extension, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setenv("CXX", compiler(tmp_path, 'printf "a library" > "$OUT"')[0])
    library = extension.load()
    assert own_cache in library.parents
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    assert extension.load() == library
    library.unlink()
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler: install g\+\+, or name one in CXX"):
        extension.load()


def test_the_package_is_not_written_to(own_cache, extension, tmp_path, monkeypatch):
    """The compiler is given the package's source, and a file in the cache to write."""
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setenv("CXX", compiler(tmp_path, f'echo "$@" > {tmp_path}/words; printf "a library" > "$OUT"')[0])
    extension.load()
    words = (tmp_path / "words").read_text(encoding="utf-8").split()
    assert str(extension.sources[0]) in words
    assert own_cache in Path(words[words.index("-o") + 1]).parents
