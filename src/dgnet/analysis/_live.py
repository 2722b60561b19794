"""A page that looks at single photos: prediction, path, executed cost and time, dense and sparse (`dgnet explore`)."""

from __future__ import annotations

import ipaddress
import os
import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dgnet._cost import cost_model
from dgnet.checkpoint import Checkpoint
from dgnet.data import decode, read_image
from dgnet.errors import BadImageError, UsageError, check_range, reason
from dgnet.graph import find_stages, node_names, record_connectivity
from dgnet.inference import set_sparse, time_alternating
from dgnet.inference._sparse import MODES
from dgnet.inference._speed import deploy

TOP = 5
"""How many classes are shown."""


@dataclass(frozen=True)
class Sight:
    """What the network did with one photo."""

    classes: list[tuple[str, float]]  # names and probabilities, the most probable first
    adjacency: list[Tensor]  # for each stage (N, N), 0 where an edge is closed
    ran: list[Tensor]  # for each stage the nodes that ran, (N,) bool
    executed: int  # multiply-adds
    dense: int  # multiply-adds with every edge open
    milliseconds: dict[str, float]  # of the dense and the sparse mode at batch 1, median over rounds that take turns


class Looker:
    """A checkpoint's network, ready for one photo at a time.

    Raises UsageError for a static network.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        network = checkpoint.build_dynamic().to(device)
        self.checkpoint, self.device = checkpoint, device
        self.network = set_sparse(network)
        self.masks = [stage.topology.mask for stage in find_stages(network)]
        size = checkpoint.preprocessing.image_size
        self.costs = cost_model(network, size)
        self.runs = {mode: deploy(network, size, mode, batch_size=1, compile=False) for mode in MODES}
        self.transform = checkpoint.preprocessing.evaluation_transform()

    @torch.no_grad()
    def look(self, image: Image.Image) -> Sight:
        """Run the network on an RGB image, once to record its path and then by the clock."""
        batch = self.transform(image)[None].to(self.device)
        with record_connectivity(self.network) as record:
            probabilities = self.network(batch)[0].float().softmax(0).cpu()
        top = probabilities.topk(min(TOP, len(probabilities)))
        names = self.checkpoint.class_names
        batch = batch.contiguous(memory_format=torch.channels_last)
        steps = {mode: partial(run, batch) for mode, run in self.runs.items()}
        seconds = time_alternating(steps, device=self.device)
        return Sight(
            classes=[(names[index], value) for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)],
            adjacency=[matrix[0].cpu() for matrix in record.adjacency],
            ran=[ran[0].cpu() for ran in record.ran],
            executed=round(float(self.costs.executed_in(record)[0])),
            dense=self.costs.dense,
            milliseconds={mode: 1000 * statistics.median(times) for mode, times in seconds.items()},
        )


def open_photo(path: Path, max_megabytes: float) -> Image.Image:
    """The RGB image in a file.

    Raises BadImageError, with the file's name but not its folder, for a file that is larger than the limit, is no image, or
    does not decode.
    """
    try:
        mebibytes = path.stat().st_size / 2**20
    except OSError as error:
        raise BadImageError(f"{path.name} cannot be read: {reason(error)}") from None
    if mebibytes > max_megabytes:
        raise BadImageError(f"{path.name} has {mebibytes:.1f} MiB, the limit is {max_megabytes:g} MiB; give a smaller one")
    return decode(read_image(path), path.name)


def format_sight(sight: Sight) -> str:
    """The figures as a sentence and a table, in HTML."""
    edges = sum(int((matrix != 0).sum()) for matrix in sight.adjacency)
    blocks = sum(len(ran) - 2 for ran in sight.ran)
    skipped = sum(int((~ran[1:-1]).sum()) for ran in sight.ran)
    cost = {"dense": sight.dense, "sparse": sight.executed}
    rows = "".join(
        f"<tr><th scope='row'>{mode}</th><td>{cost[mode] / 1e6:.2f} M</td><td>{sight.milliseconds[mode]:.2f} ms</td></tr>"
        for mode in sight.milliseconds
    )
    name, probability = sight.classes[0]
    return (
        f"<p><strong>{escape(name)}</strong>, {100 * probability:.1f} %. {edges} edges are open, {skipped} of"
        f" {blocks} blocks are skipped: {100 * sight.executed / sight.dense:.1f} % of the dense multiply-adds.</p>"
        "<table><thead><tr><th scope='col'>mode</th><th scope='col'>multiply-adds</th><th scope='col'>time</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
        "<p>An arc is an edge, the wider the more it weighs, dotted where it is closed; a dashed circle is a skipped block.</p>"
    )


def draw_path(adjacency: Sequence[Tensor], masks: Sequence[Tensor]) -> str:
    """A graph a stage as SVG in HTML: arcs run from left to right, the wider the heavier; closed edges are dotted.

    `adjacency`: for each stage (N, N), 0 where an edge is closed; `masks`: (N, N), which edges exist.
    """
    largest = max((float(matrix.abs().max()) for matrix in adjacency), default=1.0) or 1.0
    return "".join(
        _draw_stage(number, matrix, mask, largest)
        for number, (matrix, mask) in enumerate(zip(adjacency, masks, strict=True), start=1)
    )


def _draw_stage(number: int, matrix: Tensor, mask: Tensor, largest: float) -> str:
    last, width = len(mask) - 1, 640
    gap = (width - 40) / last
    radius = min(11.0, 0.32 * gap)
    tallest = min(150.0, 30.0 * last)
    base = tallest + 16
    names = node_names(len(mask))
    parts = []
    for receiver, sender in mask.nonzero().tolist():
        weight, span = float(matrix[receiver, sender]), receiver - sender
        left, right = 20 + sender * gap + radius, 20 + receiver * gap - radius
        rise = 0.0 if span == 1 else 1.33 * tallest * ((span - 1) / (last - 1)) ** 0.75
        lean = 0.25 * (right - left)
        share = abs(weight) / largest
        style = (
            f'stroke-width="{0.6 + 3.2 * share:.2f}" opacity="{0.35 + 0.65 * share:.2f}" marker-end="url(#arrow)"'
            if weight
            else 'stroke-width="1" opacity="0.35" stroke-dasharray="2 4"'
        )
        spoken = f"{names[sender]} to {names[receiver]}: {f'weight {weight:.2f}' if weight else 'closed'}"
        parts.append(
            f'<path d="M{left:.1f} {base:.1f}C{left + lean:.1f} {base - rise:.1f} {right - lean:.1f} {base - rise:.1f}'
            f' {right:.1f} {base:.1f}" {style}><title>{spoken}</title></path>'
        )
    for node, name in enumerate(names):
        x = 20 + node * gap
        is_dead = 0 < node < last and not bool(matrix[node].any())
        dashes = ' stroke-dasharray="3 3" opacity="0.6"' if is_dead else ""
        parts.append(f'<circle cx="{x:.1f}" cy="{base:.1f}" r="{radius:.1f}" stroke-width="1.5"{dashes}/>')
        if radius >= 8 or node in (0, last):
            y = base + 4 if radius >= 8 else base + radius + 12
            parts.append(
                f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" font-size="11" fill="currentColor" stroke="none">'
                f"{name}</text>"
            )
    title = f"Stage {number}: {int((matrix != 0).sum())} of {int(mask.sum())} edges open"
    arrow = (
        '<marker id="arrow" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="7" markerHeight="7" orient="auto"'
        ' markerUnits="userSpaceOnUse"><path d="M0 0L6 3L0 6Z" fill="currentColor" stroke="none"/></marker>'
    )
    return (
        f'<p>{title}</p><svg role="img" aria-label="{title}" viewBox="0 0 {width} {base + 28:.0f}" style="width: 100%"'
        f' fill="none" stroke="currentColor"><defs>{arrow}</defs>{"".join(parts)}</svg>'
    )


def import_gradio() -> Any:
    """Gradio. Raises UsageError, naming the extra, where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError:
        raise UsageError("dgnet explore needs gradio, which is not installed; type: pip install 'dgnet[explore]'") from None
    return gradio


def build_app(checkpoint: Checkpoint, device: str = "cpu", max_megabytes: float = 10.0) -> Any:
    """The Gradio page for a checkpoint, not yet served.

    Raises UsageError where gradio is not installed and for a static network.
    """
    gr = import_gradio()
    check_range("--max-megabytes", max_megabytes, 0.001)
    looker = Looker(checkpoint, device)

    def look(path: str | None) -> tuple[dict[str, float], str]:
        if path is None:
            return {}, ""
        try:
            sight = looker.look(open_photo(Path(path), max_megabytes))
        except BadImageError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from None
        return dict(sight.classes), format_sight(sight) + draw_path(sight.adjacency, looker.masks)

    # Uploads are deleted after ten minutes, and when the server stops.
    with gr.Blocks(analytics_enabled=False, title=f"dgnet: {checkpoint.model}", delete_cache=(600, 600)) as app:
        gr.Markdown(
            f"# Which path does a photo take through {checkpoint.model}?\n"
            f"{len(checkpoint.class_names)} classes. Photos stay on this machine; at most {max_megabytes:g} MiB."
        )
        with gr.Row():
            with gr.Column(scale=2):
                photo = gr.Image(label="Photo", sources=["upload", "clipboard"], type="filepath", height=320)
                # The file reaches `look` as it is: what is no image gets our message. (Not in a subclass: gradio would write a
                # stub file of it beside this one.)
                photo.preprocess = lambda payload: None if payload is None else payload.path
                classes = gr.Label(label="Prediction", num_top_classes=TOP)
            with gr.Column(scale=3):
                path = gr.HTML()
        photo.change(look, photo, [classes, path], api_name="look", show_progress="minimal")
    return app


CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:"
)
"""What the browser may load: gradio's page asks others for fonts and scripts."""


class ContentPolicy:
    """ASGI middleware that sends `CONTENT_POLICY` with every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", CONTENT_POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
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
        raise UsageError(f"--host {host} --port {port} cannot be listened on: {reason(error)}; name others") from None


def serve(app: Any, host: str = "127.0.0.1", port: int = 7860, max_megabytes: float = 10.0) -> tuple[Any, str]:
    """Serve a page of `build_app` in a thread of its own; returns its handle, whose `close()` ends it, and its address.

    Raises UsageError as `check_address` does.
    """
    from starlette.middleware import Middleware

    gr = import_gradio()
    check_address(host, port)
    # System fonts: the default theme's come from another server.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = app.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=int(max_megabytes * 2**20),
        theme=theme,
        css="td, th { padding-right: 1.5rem; text-align: left; }",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        app_kwargs={"middleware": [Middleware(ContentPolicy)]},
    )
    return app, address
