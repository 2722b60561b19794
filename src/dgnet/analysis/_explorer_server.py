"""The page that `dgnet explore` serves: the user uploads a photo and sees its prediction, path, cost and time."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from dgnet._extras import import_extra
from dgnet.analysis._explorer_guard import HostGuard, bind, is_address
from dgnet.analysis._photo import TOP, PhotoInspector, PhotoReport, open_photo
from dgnet.analysis._svg import draw_path
from dgnet.checkpoint import Checkpoint
from dgnet.errors import BadImageError, check_range, reason
from dgnet.files import writing


def format_report(report: PhotoReport) -> str:
    """The figures as one sentence and a table, in HTML."""
    edges = sum(int((matrix != 0).sum()) for matrix in report.adjacency)
    blocks = sum(len(ran) - 2 for ran in report.ran)
    skipped = sum(int((~ran[1:-1]).sum()) for ran in report.ran)
    cost = {"dense": report.dense, "sparse": report.executed}
    rows = "".join(
        f"<tr><th scope='row'>{mode}</th><td>{cost[mode] / 1e6:.2f} M</td><td>{report.milliseconds[mode]:.2f} ms</td></tr>"
        for mode in report.milliseconds
    )
    name, probability = report.classes[0]
    return (
        f"<p><strong>{escape(name)}</strong>, {100 * probability:.1f} %. {edges} edges are open, {skipped} of"
        f" {blocks} blocks are skipped: {100 * report.executed / report.dense:.1f} % of the dense multiply-adds.</p>"
        "<table><thead><tr><th scope='col'>mode</th><th scope='col'>multiply-adds</th><th scope='col'>time</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
        "<p>An arc is an edge: its width shows its weight, and it is dotted if closed. A dashed circle is a skipped block.</p>"
    )


def import_gradio() -> Any:
    """Import gradio. Raises UsageError, which names the extra to install, if it is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it at import
    return import_extra("gradio", "dgnet explore")


def build_app(checkpoint: Checkpoint, device: str = "cpu", max_megabytes: float = 10.0) -> Any:
    """The Gradio page for a checkpoint; `serve` starts it.

    Raises UsageError if gradio is not installed, and for a static network.
    """
    gr = import_gradio()
    check_range("--max-megabytes", max_megabytes, 0.001, 10**6)
    inspector = PhotoInspector(checkpoint, device)

    def look(path: str | None) -> tuple[dict[str, float], str]:
        if path is None:
            return {}, ""
        try:
            report = inspector.inspect(open_photo(Path(path), max_megabytes))
        except BadImageError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from None
        return dict(report.classes), format_report(report) + draw_path(report.adjacency, inspector.masks)

    # Uploads are deleted after ten minutes, and when the server stops.
    with gr.Blocks(analytics_enabled=False, title=f"dgnet: {checkpoint.model}", delete_cache=(600, 600)) as app:
        gr.Markdown(
            f"# Which path does a photo take through {checkpoint.model}?\n"
            f"{len(checkpoint.class_names)} classes. Photos stay on this machine; at most {max_megabytes:g} MiB."
        )
        with gr.Row():
            with gr.Column(scale=2):
                photo = gr.Image(label="Photo", sources=["upload", "clipboard"], type="filepath", height=320)
                # Pass the uploaded file to `look` unchanged, so that a file that is not an image gets our message. (A subclass
                # would do this too, but gradio writes a stub file for each subclass beside its module.)
                photo.preprocess = lambda payload: None if payload is None else payload.path
                classes = gr.Label(label="Prediction", num_top_classes=TOP)
            with gr.Column(scale=3):
                path = gr.HTML()
        photo.change(look, photo, [classes, path], api_name="look", show_progress="minimal")

    process_api = app.process_api

    async def process_quietly(*arguments: Any, **options: Any) -> Any:
        """As gradio's own, but a call that fails prints one line on the server, not a traceback."""
        try:
            return await process_api(*arguments, **options)
        except gr.Error:
            raise
        except Exception as error:  # the caller may have sent anything
            line = f"the call failed: {type(error).__name__}: {reason(error)}"
            print(f"dgnet: {line}", file=sys.stderr)
            raise gr.Error(escape(line), print_exception=False) from None

    app.process_api = process_quietly
    return app


def check_address(host: str, port: int) -> None:
    """Raises UsageError unless a server can listen on `host` and `port`."""
    check_range("--port", port, 1, 65535)
    bind(host, port).close()


@contextmanager
def own_uploads() -> Iterator[Path]:
    """Inside the `with` block, uploads go to a folder that only this user may read, and that is removed at the end.

    All temporary files of this process go there: gradio has no option for those of an upload that is not complete. gradio is to
    be imported, and `build_app` called, inside the block.

    Raises UsageError if there can be no such folder.
    """
    parent = os.environ.get("GRADIO_TEMP_DIR") or None
    with writing(f"the temporary folder {parent or ''}".strip(), "name another in TMPDIR"):
        if parent:
            Path(parent).mkdir(parents=True, exist_ok=True)
        uploads = tempfile.TemporaryDirectory(prefix="dgnet-explore-", dir=parent, ignore_cleanup_errors=True)
    saved = tempfile.tempdir
    tempfile.tempdir = os.environ["GRADIO_TEMP_DIR"] = uploads.name
    try:
        yield Path(uploads.name)
    finally:
        tempfile.tempdir = saved
        os.environ.pop("GRADIO_TEMP_DIR")
        if parent:
            os.environ["GRADIO_TEMP_DIR"] = parent
        uploads.cleanup()


class PageServer:
    """The server of a page, in its own thread. `address`: what to open in a browser."""

    def __init__(self, app: Any, listener: socket.socket, host: str) -> None:
        import uvicorn

        port = listener.getsockname()[1]
        shown = "localhost" if is_address(host) and ipaddress.ip_address(host).is_unspecified else host
        self.address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"
        self._listener = listener
        # An open page holds a connection: closing waits a second for it. HostGuard prints what fails.
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, log_level="critical", proxy_headers=False, ws="none", timeout_graceful_shutdown=1
            )
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the server of the page did not start")
            time.sleep(0.01)

    def close(self) -> None:
        """Stop the server; its port is free afterwards."""
        self._server.should_exit = True
        self._thread.join(timeout=5)
        self._listener.close()


def serve(
    app: Any, host: str = "127.0.0.1", port: int = 7860, max_megabytes: float = 10.0, allowed_hosts: Sequence[str] = ()
) -> PageServer:
    """Serve a page from `build_app` in its own thread. `allowed_hosts`: see `HostGuard`.

    Raises UsageError as `check_address` does.
    """
    import fastapi

    check_range("--port", port, 1, 65535)
    listener = bind(host, port)
    app.has_launched = True  # gradio then refuses, as input, files that were not uploaded
    page = import_gradio().mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        app,
        path="/",
        server_name=host,
        server_port=port,
        root_path="",
        show_error=False,
        max_file_size=int(max_megabytes * 2**20),
        css="td, th { padding-right: 1.5rem; text-align: left; }",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    return PageServer(HostGuard(page, host, allowed_hosts), listener, host)
