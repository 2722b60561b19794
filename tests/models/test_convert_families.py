"""One small network of each of timm's model files: it converts to the same function, or has no run for a listed reason."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import dgnet
from dgnet.errors import UsageError
from tests.helpers.static import largest_difference, shake_all_norms

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

# Model file -> name, side of the images, options that make the network smaller.
CONVERTED: dict[str, tuple[str, int, dict[str, object]]] = {
    "beit": ("beit_base_patch16_224", 64, {"depth": 3, "img_size": 64, "embed_dim": 96, "num_heads": 4}),
    "byoanet": ("halonet_h1", 256, {}),
    "byobnet": ("gernet_s", 32, {}),
    "cait": ("cait_xxs24_224", 64, {"depth": 3, "img_size": 64}),
    "convit": ("convit_tiny", 64, {"depth": 4, "img_size": 64, "local_up_to_layer": 2}),
    "convmixer": ("convmixer_1024_20_ks9_p14", 56, {}),
    "convnext": ("test_convnext", 32, {}),
    "cpubone": ("cpubone_nano", 32, {}),
    "crossvit": ("crossvit_tiny_240", 32, {}),
    "csatv2": ("csatv2", 64, {}),
    "cspnet": ("cs3darknet_focus_s", 32, {}),
    "cspnext": ("cspnext_s", 32, {}),
    "davit": ("davit_tiny", 32, {"embed_dims": (24, 48, 96, 192), "num_heads": (1, 2, 4, 8), "depths": (2, 2, 2, 2)}),
    "deepseek_vit": ("deepseek_vit_412m", 56, {"depth": 3, "embed_dim": 96, "num_heads": 2, "img_size": 56}),
    "deit": ("deit_tiny_patch16_224", 64, {"depth": 3, "img_size": 64}),
    "edgenext": ("edgenext_xx_small", 32, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientformer_v2": ("efficientformerv2_s0", 224, {}),
    "efficientnet": ("mixnet_s", 32, {}),
    "efficientvit_mit": ("efficientvit_b0", 32, {}),
    "efficientvit_msra": ("efficientvit_m0", 224, {}),
    "eva": ("eva02_tiny_patch14_224", 56, {"depth": 3, "img_size": 56}),
    "fasternet": ("fasternet_t0", 32, {}),
    "fastvit": ("fastvit_t8", 32, {}),
    "focalnet": ("focalnet_small_lrf", 32, {}),
    "ghostnet": ("ghostnet_050", 32, {}),
    "hardcorenas": ("hardcorenas_b", 32, {}),
    "hgnet": ("hgnetv2_b4", 32, {}),
    "hiera": ("hiera_tiny_224", 224, {"embed_dim": 24}),
    "hieradet_sam2": ("sam2_hiera_tiny", 32, {"embed_dim": 24}),
    "hrnet": ("hrnet_w18_small", 32, {}),
    "iformer": ("iformer_l", 32, {}),
    "inception_next": ("inception_next_atto", 32, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 96, {}),
    "levit": ("levit_128s", 224, {}),
    "lowformer": ("lowformer_b0", 32, {}),
    "mambaout": ("test_mambaout", 32, {}),
    "maxxvit": ("test_maxvit", 160, {}),
    "metaformer": ("poolformerv2_s12", 32, {}),
    "mlp_mixer": ("gmlp_ti16_224", 64, {"img_size": 64}),
    "mobilenetv3": ("mobilenetv3_small_050", 32, {}),
    "mobilenetv5": ("mobilenetv5_base", 32, {"channel_multiplier": 0.25}),
    "mobilevit": ("mobilevit_xxs", 32, {}),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", 64, {"depth": 3, "embed_dim": 96, "num_heads": 4}),
    "nest": ("nest_tiny", 224, {}),
    "nextvit": ("nextvit_small", 32, {}),
    "nfnet": ("nf_regnet_b0", 32, {}),
    "pit": ("pit_ti_224", 224, {}),
    "pvt_v2": ("pvt_v2_b0", 32, {}),
    "qwen3_vit": ("qwen3_vit_88m", 64, {"depth": 3, "embed_dim": 96, "num_heads": 4}),
    "regnet": ("regnetx_002", 32, {}),
    "repghost": ("repghostnet_050", 32, {}),
    "repvit": ("repvit_m1", 32, {}),
    "res2net": ("res2next50", 32, {"layers": (3, 2, 2, 2)}),
    "resnest": ("resnest26d", 32, {"layers": (3, 2, 2, 2)}),
    "resnet": ("resnet18", 32, {}),
    "resnetv2": ("resnetv2_18", 32, {"layers": (3, 2, 2, 2)}),
    "senet": ("legacy_seresnet18", 32, {}),
    "sequencer": (
        "sequencer2d_s",
        32,
        {"layers": (2, 2, 2, 2), "embed_dims": (24, 48, 48, 48), "hidden_sizes": (6, 12, 12, 12)},
    ),
    "shvit": ("shvit_s1", 32, {}),
    "sknet": ("skresnet18", 32, {}),
    "starnet": ("starnet_s050", 32, {}),
    "swiftformer": ("swiftformer_xs", 32, {}),
    "swin_transformer": (
        "swin_tiny_patch4_window7_224",
        64,
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)},
    ),
    "swin_transformer_v2": (
        "swinv2_base_window8_256",
        64,
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)},
    ),
    "swin_transformer_v2_cr": (
        "swinv2_cr_tiny_224",
        64,
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)},
    ),
    "tiny_vit": ("tiny_vit_5m_224", 32, {}),
    "tresnet": ("tresnet_m", 32, {}),
    "twins": ("twins_svt_small", 32, {"embed_dims": (16, 32, 64, 64), "num_heads": (1, 2, 4, 4)}),
    "visformer": ("visformer_tiny", 64, {"img_size": 64}),
    "vision_transformer": ("test_vit", 32, {"img_size": 32}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 64, {"img_size": 64, "depth": 3}),
    "vision_transformer_relpos": ("test_vit_relpos", 160, {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", 64, {"img_size": 64, "depth": 3, "embed_dim": 96, "num_heads": 4}),
    "vitamin": ("vitamin_small_224", 64, {"img_size": 64}),
    "volo": ("volo_d1_224", 64, {"img_size": 64}),
    "vovnet": ("ese_vovnet57b", 32, {}),
    "xception": ("legacy_xception", 32, {}),
    "xception_aligned": ("xception41", 32, {}),
    "xcit": ("xcit_nano_12_p16_224", 32, {"depth": 3}),
}

# Model file -> the same, and why the network has no run.
STATIC: dict[str, tuple[str, int, dict[str, object], str]] = {
    "coat": ("coat_tiny", 224, {}, "it shares parameters with"),
    "densenet": ("densenet121", 32, {}, "it changes the shape"),
    "dla": ("dla46_c", 32, {}, "it is one block only"),
    "dpn": ("dpn48b", 32, {}, "it changes the shape"),
    "efficientvim": ("efficientvim_m1", 32, {}, "it does not return one tensor"),
    "gcvit": ("gcvit_xxtiny", 224, {}, "it changes the shape"),
    "gemma4_vit": ("gemma4_vit_167m", 32, {"depth": 2}, "it is called with further values for each image"),
    "inception_v3": ("inception_v3", 96, {}, "it has no residual blocks"),
    "inception_v4": ("inception_v4", 96, {}, "it has no residual shortcut"),
    "lcnetv2": ("lcnetv2_small", 32, {}, "it has no residual shortcut"),
    "mvitv2": ("mvitv2_tiny", 32, {}, "it does not return one tensor"),
    "nasnet": ("nasnetalarge", 32, {}, "it has no residual blocks"),
    "pnasnet": ("pnasnet5large", 32, {}, "it has no residual blocks"),
    "rdnet": ("rdnet_tiny", 32, {}, "it is not called with one tensor"),
    "rexnet": ("rexnet_100", 32, {}, "it changes the shape"),
    "selecsls": ("selecsls42", 32, {}, "it is not called with one tensor"),
    "tnt": ("tnt_s_patch16_224", 224, {}, "it is called with further values for each image"),
    "vgg": ("vgg11", 32, {}, "it has no residual blocks"),
}

TOLERANCE = 1e-5


def find_files() -> dict[str, list[str]]:
    """timm's own model files, with the names that they register."""
    files: dict[str, list[str]] = {}
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        if module.startswith("timm.models."):
            files.setdefault(module.rpartition(".")[2], []).append(name)
    return files


def build(name: str, options: dict[str, object]) -> nn.Module:
    """The network with random normalisation statistics and without dropout."""
    network = shake_all_norms(timm.create_model(name, num_classes=10, **options))
    for module in network.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return network


@torch.no_grad()
def run(network: nn.Module, images: Tensor, is_training: bool) -> Tensor:
    """All outputs in a row, (B, …). In training some networks draw random numbers."""
    torch.manual_seed(1)
    outputs = network.train(is_training)(images)
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    return torch.cat([output.flatten(1) for output in outputs], dim=1)


def test_every_file_of_timm_is_listed():
    files = find_files()
    assert {*CONVERTED, *STATIC} == set(files), "a model file of timm is new or gone: add a small network of it to a table"
    assert not {*CONVERTED} & {*STATIC}
    for file, (name, *_) in {**CONVERTED, **STATIC}.items():
        assert name in files[file]


def test_most_files_of_timm_convert():
    assert len(CONVERTED) >= 0.8 * (len(CONVERTED) + len(STATIC))


@pytest.mark.slow
@pytest.mark.parametrize("file", CONVERTED)
def test_the_function_stays_the_same(file):
    name, side, options = CONVERTED[file]
    static, images = build(name, options), torch.randn(3, 3, side, side)
    converted = dgnet.convert(static, image_size=side)
    assert converted.conversion.stages
    gated = dgnet.convert(static, image_size=side, node_gate="hard")
    for network, is_training in ((converted, False), (gated, False), (converted, True)):
        expected = run(static, images, is_training)
        assert expected.abs().max() > 0
        difference = largest_difference(run(network, images, is_training), expected)
        if difference > TOLERANCE:  # batch statistics of small maps amplify rounding: as much as in the static network itself
            exact = run(static.double(), images.double(), is_training)
            rounding = max(largest_difference(expected.double(), exact), TOLERANCE)
            assert difference < 50 * rounding  # the ratio of two rounding errors varies much; float64 decides
            again = run(network.double(), images.double(), is_training)
            assert largest_difference(again, exact) < 1e-9 * max(1.0, rounding / 1e-5)
            static.float()
            network.float()


@pytest.mark.slow
@pytest.mark.parametrize("file", STATIC)
def test_a_network_without_runs_says_why(file):
    name, side, options, reason = STATIC[file]
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=10, **options)
    with pytest.raises(UsageError, match=rf"has no run of blocks that could become a stage \(.*{reason}"):
        dgnet.convert(network, image_size=side)
