"""`dgnet explore`: what it says of a photo, what it refuses, and its page in a browser."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile

import pytest
import torch
from PIL import Image

from dgnet.analysis._explorer_guard import HostGuard, is_loopback
from dgnet.analysis._explorer_server import format_report, own_uploads
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
from tests.helpers.processes import free_port, hear_signals

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


def ask_guard(guard, headers, kind="http"):
    """The status with which `guard` answers a request with these headers, and its text."""
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(guard({"type": kind, "headers": [(key.encode(), value.encode()) for key, value in headers]}, None, send))
    return sent[0].get("status", sent[0].get("code")), sent[-1].get("body", b"").decode()


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"page"})


@pytest.mark.parametrize(
    ("host", "allowed", "answered", "refused"),
    [
        (
            "127.0.0.1",
            [],
            ["127.0.0.1:7860", "localhost", "LocalHost.:9000", "[::1]:7860"],
            ["evil.org", "evil.org:7860", "127.0.0.1.evil.org", "10.0.0.1", "0.0.0.0", "", "a@localhost", "localhost:1:2"],
        ),
        ("127.0.0.1", ["Photos.Example"], ["photos.example:80", "localhost"], ["example", "evil.org"]),
        ("192.168.7.8", [], ["192.168.7.8:7860", socket.gethostname()], ["evil.org", "192.168.7.9"]),
        ("0.0.0.0", [], ["192.168.7.8", "[fe80::1]:7860", "localhost", socket.gethostname()], ["evil.org", "1.2.3.4.org"]),
    ],
)
def test_the_page_answers_to_its_own_names_only(host, allowed, answered, refused):
    guard = HostGuard(answer, host, allowed)
    for name in answered:
        assert ask_guard(guard, [("Host", name)]) == (200, "page"), name
        assert ask_guard(guard, [("host", name), ("origin", f"http://{name}")]) == (200, "page")
    for name in refused:
        status, line = ask_guard(guard, [("host", name)])
        assert status == 421
        assert line == f"this page does not answer to the host {name!r}; allow a name with: dgnet explore --allowed-host NAME\n"
    assert ask_guard(guard, [])[0] == 421
    assert ask_guard(guard, [("host", answered[0]), ("host", "evil.org")])[0] == 421


@pytest.mark.parametrize("origin", ["http://evil.org", "null", "http://localhost:3000", "http://localhost", "file://", ""])
def test_requests_of_other_pages_are_refused(origin):
    guard = HostGuard(answer, "127.0.0.1")
    status, line = ask_guard(guard, [("host", "localhost:7860"), ("origin", origin)])
    assert (status, line) == (403, f"this page answers only requests of its own, and this one comes from {origin!r}\n")


def test_web_sockets_are_refused():
    assert ask_guard(HostGuard(answer, "127.0.0.1"), [("host", "localhost")], "websocket")[0] == 1008


def test_a_request_that_fails_prints_one_line(capsys):
    async def fail(scope, receive, send):
        raise KeyError("no\nsuch call")

    assert ask_guard(HostGuard(fail, "127.0.0.1"), [("host", "localhost")]) == (500, "the request failed\n")
    assert capsys.readouterr().err == "dgnet: a request of the page failed: 'no\\nsuch call'\n"


def test_uploads_are_private_and_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    before = tempfile.gettempdir()
    with own_uploads() as uploads:
        assert uploads.parent == tmp_path / "uploads"
        assert uploads.stat().st_mode & 0o777 == 0o700
        assert os.environ["GRADIO_TEMP_DIR"] == tempfile.gettempdir() == str(uploads)
        (uploads / "photo.png").touch()
    assert not uploads.exists()
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / "uploads")
    assert tempfile.gettempdir() == before


@needs_gradio
def test_mistakes_end_in_one_line(checkpoint, tmp_path, capsys):
    static = write_checkpoint(tmp_path / "static.safetensors", "resnet20")
    assert "is of resnet20, a static network: it has no routed edges" in refuse(capsys, "explore", static)
    assert "nowhere does not exist" in refuse(capsys, "explore", "nowhere")
    assert "--port must be 1 to 65535, got 0" in refuse(capsys, "explore", checkpoint, "--port", 0)
    for size in (0, 1e308):
        assert "--max-megabytes must be 0.001 to 1000000" in refuse(capsys, "explore", checkpoint, "--max-megabytes", size)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on --host 127.0.0.1 --port {port}" in refuse(capsys, "explore", checkpoint, "--port", port)


COMMAND = """
import socket, sys
connect = socket.socket.connect
socket.socket.connect = lambda self, address: (print("reached", address, file=sys.stderr), connect(self, address))[1]
try:
    socket.create_connection(("127.0.0.1", 1), 1)  # shows that connections are noted
except OSError:
    pass
from dgnet.cli import main
sys.exit(main(sys.argv[1:]))
"""


@contextlib.contextmanager
def run_server(checkpoint, tmp_path, *options):
    """The command in a process of its own; yields the process and its port. Its temporary folder is tmp_path / "tmp"."""
    (tmp_path / "tmp").mkdir()
    port = free_port()
    command = [sys.executable, "-m", "dgnet", "explore", checkpoint, "--port", port, "--max-megabytes", 1, *options]
    server = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp"), "http_proxy": "http://127.0.0.1:9"},
        preexec_fn=hear_signals,
    )
    try:
        assert server.stdout.readline() == f"dg_resnet20 at http://127.0.0.1:{port}/ (Ctrl+C ends it)\n"
        yield server, port
    finally:
        server.kill()
        server.communicate()


def request(port, method, path, body=None, headers=None):
    """The status and the text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def upload(port, content):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + content + b"\r\n--x--\r\n"
    return request(port, "POST", "/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})


def look(port, *values):
    body = json.dumps({"data": values})
    return request(port, "POST", "/gradio_api/run/look", body, {"Content-Type": "application/json"})


@needs_gradio
@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_server_refuses_in_a_line_and_leaves_nothing(checkpoint, photo, tmp_path, signum):
    with run_server(checkpoint, tmp_path) as (server, port):
        assert request(port, "GET", "/")[0] == 200
        for path in ("/", "/config", "/gradio_api/file=/etc/passwd", "/gradio_api/queue/data?session_hash=a", "/theme.css"):
            assert request(port, "GET", path, headers={"Host": "evil.org"})[0] == 421
            assert request(port, "POST", path, "", headers={"Origin": "http://evil.org"})[0] == 403
        preflight = {"Origin": "http://evil.org", "Access-Control-Request-Method": "POST"}
        assert request(port, "OPTIONS", "/gradio_api/upload", headers=preflight)[0] == 403
        status, text = upload(port, photo.read_bytes())
        assert status == 200
        (uploaded,) = json.loads(text)
        file = {"path": uploaded, "meta": {"_type": "gradio.FileData"}}
        assert look(port, file)[0] == 200
        assert upload(port, bytes(2**21))[0] == 413
        outside = io.BytesIO()
        Image.new("RGB", (8, 8)).save(outside, "PNG")
        (tmp_path / "secret.png").write_bytes(outside.getvalue())
        status, text = look(port, {**file, "path": str(tmp_path / "secret.png")})
        assert (status, "it was not uploaded" in text) == (500, True)
        assert all(
            look(port, *values)[0] == 500 for values in (["text"], [5], [], [{"path": 5}], [{**file, "path": "a" * 5000}])
        )
        for path in ("/gradio_api/run/other", "/gradio_api/call/other"):
            body = '{"data": [], "session_hash": "a"}'
            assert request(port, "POST", path, body, {"Content-Type": "application/json"})[0] == 500
        assert request(port, "POST", "/gradio_api/run/look", "{", {"Content-Type": "application/json"})[0] == 422
        assert any((tmp_path / "tmp").rglob("*.png"))
        server.send_signal(signum)
        _, errors = server.communicate(timeout=300)
        assert server.returncode == (130 if signum == signal.SIGINT else 143)
        assert not list((tmp_path / "tmp").iterdir())
        lines = [line for line in errors.splitlines() if not line.startswith("compiling the ")]
        assert all(line.startswith("dgnet: ") for line in lines), errors


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
        preexec_fn=hear_signals,
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
        _, errors = server.communicate(timeout=300)
    assert server.returncode == 130
    assert errors.endswith("dgnet: interrupted\n")
    assert "Traceback" not in errors
    reached = re.findall(r"^reached \('([^']+)', ", errors, re.MULTILINE)
    assert reached
    assert all(map(is_loopback, reached))
