"""`dgnet publish`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

from jsonargparse import Namespace

from dgnet.cli.command import Command, Parser, add_checkpoint, add_json, print_json
from dgnet.typed import Location


def _publish_parser() -> Parser:
    parser = Parser(
        description="Publish a trained network in a folder or on the Hugging Face Hub: weights, timm's config.json, model card."
    )
    add_checkpoint(parser)
    parser.add_argument("--to", type=Location, help="required: new or empty folder, or hf-hub:USER/NAME")
    parser.add_argument(
        "--evaluation",
        type=Location | None,
        default=None,
        help="JSON file with the output of dgnet evaluate RUN --json, for the model card; by default what metrics.csv says",
    )
    parser.add_argument("--license", type=str | None, default=None, help="license of the weights, such as apache-2.0")
    parser.add_argument("--private", action="store_true", help="with hf-hub: a new repository is private")
    add_json(parser)
    return parser


def run_publish(args: Namespace) -> None:
    """`dgnet publish`."""
    from dgnet.documents import read_json
    from dgnet.errors import UsageError
    from dgnet.publishing import publish

    if args.to is None:
        raise UsageError("--to FOLDER or --to hf-hub:USER/NAME is missing")
    evaluation = None if args.evaluation is None else read_json(Path(args.evaluation), "--evaluation")
    if evaluation is not None and not isinstance(evaluation, dict):
        raise UsageError(f"--evaluation {args.evaluation} holds no JSON object; write it with: dgnet evaluate RUN --json")
    written = publish(args.checkpoint, args.to, evaluation=evaluation, license=args.license, private=args.private)
    if args.json:
        print_json(asdict(written))
        return
    print(f"published; load it with: dgnet.create_model({written.source!r})")
    print(f"use it: dgnet {'detect ' * (written.task == 'detect')}predict {shlex.quote(written.source)} photo.jpg")


PUBLISH = Command(_publish_parser, run_publish)
