"""`dgnet explore`: a page in the browser for the user's own photos."""

from __future__ import annotations

import sys
import time

from jsonargparse import Namespace

from dgnet.cli.command import Command, Parser, add_device, find_device
from dgnet.cli.weights import add_checkpoint_or_weights, open_checkpoint, remark


def _explore_parser() -> Parser:
    parser = Parser(description="Serve a page that shows a photo's prediction, path, executed cost and time.")
    add_checkpoint_or_weights(parser)
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help="address to listen on; by default reachable from this machine only"
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument(
        "--allowed-host",
        type=str,
        nargs="+",
        default=[],
        metavar="NAME",
        help="further names of this machine under which the page is opened; by default its address, its host name, localhost",
    )
    parser.add_argument("--max-megabytes", type=float, default=10.0, help="largest file accepted, in MiB")
    add_device(parser)
    return parser


def run_explore(args: Namespace) -> None:
    """`dgnet explore`; serves until it is interrupted."""
    from dgnet.analysis import build_app, check_address, import_gradio, is_loopback, own_uploads, serve

    with own_uploads():  # also removed after a signal: it is an exception; see dgnet._guard
        import_gradio()
        check_address(args.host, args.port)
        checkpoint, remarks = open_checkpoint(args)
        app = build_app(checkpoint, find_device(args.device), args.max_megabytes)
        server = serve(app, args.host, args.port, args.max_megabytes, args.allowed_host)
        remark(remarks)
        try:
            if not is_loopback(args.host):
                print("anyone who can reach this machine over the network can use the page", file=sys.stderr)
            print(f"{checkpoint.model} at {server.address} (Ctrl+C ends it)", flush=True)
            while True:  # until a signal; Windows does not interrupt a wait without end
                time.sleep(1)
        finally:
            server.close()


EXPLORE = Command(_explore_parser, run_explore)
