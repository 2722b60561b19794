"""The page that `dgnet explore` serves: the user uploads a photo and sees its prediction, path, cost and time."""

from __future__ import annotations

import ipaddress
import os
import socket
from html import escape
from pathlib import Path
from typing import Any

from dgnet.analysis._photo import TOP, PhotoInspector, PhotoReport, open_photo
from dgnet.analysis._svg import draw_path
from dgnet.checkpoint import Checkpoint
from dgnet.errors import BadImageError, UsageError, check_range, reason


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
    try:
        import gradio
    except ImportError:
        raise UsageError("dgnet explore needs gradio, which is not installed; type: pip install 'dgnet[explore]'") from None
    return gradio


def build_app(checkpoint: Checkpoint, device: str = "cpu", max_megabytes: float = 10.0) -> Any:
    """The Gradio page for a checkpoint; `serve` starts it.

    Raises UsageError if gradio is not installed, and for a static network.
    """
    gr = import_gradio()
    check_range("--max-megabytes", max_megabytes, 0.001)
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
    return app


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(host: str, port: int) -> None:
    """Raises UsageError unless a server can listen on `host` and `port`."""
    check_range("--port", port, 1, 65535)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot listen on --host {host} --port {port}: {reason(error)}; choose others") from None


def serve(app: Any, host: str = "127.0.0.1", port: int = 7860, max_megabytes: float = 10.0) -> tuple[Any, str]:
    """Serve a page from `build_app` in its own thread; returns the app, whose `close()` stops it, and its address.

    Raises UsageError as `check_address` does.
    """
    check_address(host, port)
    _, address, _ = app.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=int(max_megabytes * 2**20),
        css="td, th { padding-right: 1.5rem; text-align: left; }",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    return app, address
