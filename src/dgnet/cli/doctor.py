"""`dgnet doctor`: what is installed here, and which forms of aggregation and of the sparse mode are used."""

from __future__ import annotations

from dataclasses import asdict

from jsonargparse import Namespace

from dgnet.cli.command import Command, Parser, add_device, add_json, find_device, print_json


def _doctor_parser() -> Parser:
    parser = Parser(
        description="Print versions, devices, extras, and which forms of aggregation and of the sparse mode are used and why."
        " The compiled forms are built now if they were not built before."
    )
    add_device(parser)
    add_json(parser)
    return parser


def run_doctor(args: Namespace) -> None:
    """`dgnet doctor`."""
    from dgnet._doctor import examine, format_installation

    found = examine(find_device(args.device))
    if args.json:
        print_json(asdict(found))
    else:
        print(format_installation(found))


DOCTOR = Command(_doctor_parser, run_doctor)
