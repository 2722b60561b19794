"""`dgnet explore`: what it says of a photo, what it refuses, and its page in a browser."""

from __future__ import annotations

import importlib.util
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from PIL import Image

from dgnet.analysis._explorer_server import format_report, is_loopback
from dgnet.analysis._photo import PhotoInspector, open_photo
from dgnet.analysis._svg import draw_path
from dgnet.checkpoint import describe_network, load_checkpoint, save_tensors
from dgnet.data import Preprocessing, decode
from dgnet.errors import BadImageError
from dgnet.graph import find_stages, record_connectivity
from dgnet.models import create_model
from tests.helpers.browser import open_browser, watch
from tests.helpers.command import refuse
from tests.helpers.data import CLASSES, jpeg
from tests.helpers.networks import close_some, spread_routers
from tests.helpers.processes import free_port

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="needs gradio: pip install 'dgnet[explore]'"
)


def write_checkpoint(path, model="dg_resnet20", **options):
    network = create_model(model, num_classes=5, channels=(4, 4, 4), **options)
    if model.startswith("dg_"):
        for stage in find_stages(network):
            spread_routers(stage)
        close_some(network, torch.randn(8, 3, 16, 16))
    carried = describe_network(
        model, {"channels": [4, 4, 4], **options}, CLASSES, Preprocessing((16, 16), (0.5,) * 3, (0.2,) * 3), {}
    )
    save_tensors(network.state_dict(), path, carried)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "model.safetensors")


@pytest.fixture
def photo(tmp_path):
    image = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 9).convert("RGB")
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@torch.no_grad()
def test_a_photos_figures_equal_a_dense_run(checkpoint, photo):
    loaded = load_checkpoint(checkpoint)
    image = open_photo(photo, 1)
    report = PhotoInspector(loaded).inspect(image)
    network = loaded.build_network()
    with record_connectivity(network) as record:
        probabilities = network(loaded.preprocessing.evaluation_transform()(image)[None])[0].softmax(0)
    assert [name for name, _ in report.classes] == [CLASSES[i] for i in probabilities.argsort(descending=True)]
    assert [value for _, value in report.classes] == pytest.approx(
        probabilities.sort(descending=True).values.tolist(), abs=1e-5
    )
    for matrix, recorded, ran, alive in zip(report.adjacency, record.adjacency, report.ran, record.ran, strict=True):
        torch.testing.assert_close(matrix, recorded[0], atol=1e-5, rtol=0)
        assert torch.equal(ran, alive[0])
    assert set(report.milliseconds) == {"dense", "sparse"}
    assert min(report.milliseconds.values()) > 0
    assert 0 < report.executed < report.dense
    text = format_report(report)
    assert f"<td>{report.executed / 1e6:.2f} M</td>" in text
    assert not {"<b>", "</script>"} & set(re.findall(r"</?\w+>", text))  # class names are escaped


def test_the_path_has_every_edge_once(checkpoint, photo):
    inspector = PhotoInspector(load_checkpoint(checkpoint))
    report = inspector.inspect(open_photo(photo, 1))
    drawn = draw_path(report.adjacency, inspector.masks)
    spoken = re.findall(r"<title>(\w+) to (\w+): (?:weight (-?[\d.]+)|closed)</title>", drawn)
    expected = []
    for matrix, mask in zip(report.adjacency, inspector.masks, strict=True):
        names = ["in", *map(str, range(1, len(mask) - 1)), "out"]
        for j, i in mask.nonzero().tolist():
            weight = float(matrix[j, i])
            expected.append((names[i], names[j], f"{weight:.2f}" if weight else ""))
    assert spoken == expected
    assert "" in {weight for *_, weight in expected}


def test_files_that_are_refused(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(BadImageError, match=r"^a\.jpg does not decode as an image \(no known image format\)"):
        open_photo(tmp_path / "a.jpg", 1)
    (tmp_path / "b.jpg").write_bytes(jpeg(0) + bytes(2**20))
    with pytest.raises(BadImageError, match=r"^b\.jpg has 1\.0 MiB, the limit is 0\.5 MiB"):
        open_photo(tmp_path / "b.jpg", 0.5)
    with pytest.raises(BadImageError, match=r"^c\.jpg cannot be read: No such file"):
        open_photo(tmp_path / "c.jpg", 1)
    (tmp_path / "d.png").write_bytes(jpeg(3))
    assert decode((tmp_path / "d.png").read_bytes(), "d").size == open_photo(tmp_path / "d.png", 1).size


def test_only_loopback_addresses_are_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.3", "example.org")))


def test_without_gradio_the_extra_is_named(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = refuse(capsys, "explore", checkpoint)
    assert line == "dgnet: dgnet explore needs gradio, which is not installed; type: pip install 'dgnet[explore]'\n"


@needs_gradio
def test_mistakes_end_in_one_line(checkpoint, tmp_path, capsys):
    static = write_checkpoint(tmp_path / "static.safetensors", "resnet20")
    assert "is of resnet20, a static network: it has no routed edges" in refuse(capsys, "explore", static)
    assert "nowhere does not exist" in refuse(capsys, "explore", "nowhere")
    assert "--port must be 1 to 65535, got 0" in refuse(capsys, "explore", checkpoint, "--port", 0)
    assert "--max-megabytes must be at least" in refuse(capsys, "explore", checkpoint, "--max-megabytes", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on --host 127.0.0.1 --port {port}" in refuse(capsys, "explore", checkpoint, "--port", port)


COMMAND = """
import socket, sys
connect = socket.socket.connect
socket.socket.connect = lambda self, address: (print("reached", address, file=sys.stderr), connect(self, address))[1]
from dgnet.cli import main
sys.exit(main(sys.argv[1:]))
"""


@needs_gradio
@pytest.mark.slow
def test_the_page_in_a_browser(checkpoint, photo, tmp_path):
    """In a process of its own, as it is typed: gradio leaves sockets and event loops to the garbage collector."""
    (tmp_path / "fake.png").write_text("no image")
    (tmp_path / "large.png").write_bytes(bytes(2**21))
    command = [sys.executable, "-c", COMMAND, "explore", checkpoint, "--port", free_port(), "--max-megabytes", 1]
    server = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a job in the background ignores it
    )
    try:
        with open_browser() as browser:
            line = server.stdout.readline()
            address = re.fullmatch(r"dg_resnet20 at (http://127\.0\.0\.1:\d+/) \(Ctrl\+C ends it\)\n", line)[1]
            page = browser.new_page()
            page.set_default_timeout(60_000)
            wrong = watch(page, (address, "data:", "blob:"))
            page.goto(address)
            page.set_input_files("input[type=file]", photo)
            page.wait_for_selector("svg[aria-label^='Stage 3']")
            assert page.locator("svg path title").count() == 30
            rows = page.eval_on_selector_all("tbody tr", "rows => rows.map(row => row.innerText)")
            assert [row.split()[0] for row in rows] == ["dense", "sparse"]
            assert wrong == []
            for file, message in (("fake.png", "fake.png does not decode as an image"), ("large.png", "exceed the maximum")):
                page.goto(address)
                page.set_input_files("input[type=file]", tmp_path / file)
                page.get_by_text(message).first.wait_for()
            assert not [text for text in wrong if "://" in text and address not in text]
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    assert server.returncode == 130
    assert errors.endswith("dgnet: interrupted\n")
    assert "Traceback" not in errors
    reached = re.findall(r"^reached \('([^']+)', ", errors, re.MULTILINE)
    assert reached
    assert all(map(is_loopback, reached))
