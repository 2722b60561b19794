"""`dgnet doctor`: what is installed here, and which form of the sparse mode is used."""

from __future__ import annotations

from dataclasses import asdict

from jsonargparse import Namespace

from dgnet.cli.command import Command, Parser, add_device, add_json, find_device, print_json


def _doctor_parser() -> Parser:
    parser = Parser(
        description="Print versions, devices, extras, and which form of the sparse mode is used and why. The compiled form is"
        " built now if it was not built before."
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
