"""Export networks to files for other runtimes: torch.export and ONNX."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dgnet._extras import EXTRAS, import_extra
from dgnet.errors import UsageError, check_choice, reason
from dgnet.files import replace_content, replace_file, writing
from dgnet.graph import find_stages
from dgnet.inference._branching import has_batch_norms
from dgnet.inference._fold import fold_batch_norms
from dgnet.inference._sparse import MODES, set_mode
from dgnet.models import find_channels

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
"""Format -> file name extension."""
_LARGEST_ONNX = 2**30  # bytes of weights; torch writes those of larger networks to a second file, from 1.5 GiB on


def export_network(network: nn.Module, image_size: int | tuple[int, int], mode: str = "dense") -> ExportedProgram:
    """`network` in evaluation mode as one graph with a symbolic batch size: (B, C, H, W) -> (B, classes).

    Normalisations are folded. `mode`: "dense", every node on every sample, closed edges masked; "sparse", each node on the
    gathered samples for which it is alive.

    Raises UsageError for an unknown mode, for "sparse" if the network has no dynamic stages or normalisations that cannot be
    folded, and if the exporter fails.
    """
    check_choice("--mode", mode, MODES)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    folded = fold_batch_norms(network, (height, width)).cpu().float()
    set_mode(folded, mode)
    if mode == "sparse" and any(has_batch_norms(stage.nodes) for stage in find_stages(folded)):
        raise UsageError(
            f"{type(network).__name__} has batch normalisations that no convolution takes in; export it with --mode dense"
        )
    images = torch.randn(5, find_channels(network), height, width)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(folded, (images,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)
    except Exception as error:  # the exporter may raise anything for a module of the user's own
        raise UsageError(f"{type(network).__name__} cannot be exported in its {mode} form: {reason(error)}") from error
    if any("_assert_scalar" in str(node.target) and "Ne(u" in str(node.args) for node in program.graph.nodes):
        raise UsageError(
            f"{type(network).__name__} has blocks that torch cannot export for a number of samples that may be 0; export it"
            " with --mode dense"
        )
    return program


def require_packages(format: str) -> None:
    """Raises UsageError for an unknown format, and if a package is missing that writes it or checks what is written."""
    check_choice("--format", format, FORMATS)
    for package in EXTRAS["export"] if format == "onnx" else ():
        import_extra(package, "--format onnx")


def save_export(program: ExportedProgram, path: Path, format: str, carried: dict[str, Any]) -> None:
    """Write an exported network. `carried`: its description (class names, preprocessing, …), stored as metadata under "dgnet".

    `format`: "onnx", with input `images` and output `logits`; "torch", which `torch.export.load` reads.

    Raises UsageError for an unknown format, for a file that cannot be written, and if a package is missing.
    """
    require_packages(format)
    text = json.dumps(carried)
    with writing(path):
        if format == "torch":
            with replace_content(path) as file:
                torch.export.save(program, file, extra_files={"dgnet": text})
            return
        with _quiet():
            translated = torch.onnx.export(
                program, (), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
            )
        assert translated is not None
        translated.model.metadata_props["dgnet"] = text
        size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
        if size > _LARGEST_ONNX:  # the weights go to a second file, which is named after the first
            translated.save(path)
            return
        with replace_file(path) as written:
            translated.save(written)


def run_onnx(path: Path, images: Tensor) -> Tensor:
    """The logits that onnxruntime computes from an exported network on the CPU."""
    onnxruntime = import_extra("onnxruntime", "--format onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(logits)


def check_export(path: Path, format: str, network: nn.Module, image_size: tuple[int, int]) -> float:
    """The largest difference from `network`, relative to its largest logit, over batches of 1, 3 and 8 images of noise.

    Raises UsageError if it is more than 1e-3: the file must not be used.
    """
    generator = torch.Generator().manual_seed(0)
    network = network.cpu().float().eval()
    worst = 0.0
    for batch in (1, 3, 8):
        images = torch.randn(batch, find_channels(network), *image_size, generator=generator)
        with torch.no_grad():
            expected = network(images)
            found = run_onnx(path, images) if format == "onnx" else torch.export.load(path).module()(images)
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not difference <= 1e-3:  # also true for NaN
            raise UsageError(f"{path} differs from the checkpoint by {difference:.1e} of the largest logit; do not use it")
        worst = max(worst, difference)
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' log messages and warnings, which are meant for their developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
