"""Networks of transformers with FDConv in their feed-forward networks, exported and compared.

    python tests/real_packages/transformers/check.py [NAME…]

Small networks of random weights; nothing is downloaded. README.md says how to install what it
needs. Each is replaced in place, exported with portable and, where they are built, native
operators, and run on an image that the export did not see.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from torch import Tensor, nn

from fdconv_deploy import export_module, open_session
from fdconv_deploy.nn import FDConv2d, replace_convolutions, replace_linears
from fdconv_deploy.ops.native import native_library

TOLERANCE = 2e-5
SWIN = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [2, 2, 4, 8], "window_size": 4}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def segformer() -> nn.Module:
    config = tf.SegformerConfig(
        hidden_sizes=[24, 32, 48, 64], depths=[1, 2, 1, 1], num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32, num_labels=7,
    )  # fmt: skip
    return tf.SegformerForSemanticSegmentation(config)


def upernet_swin() -> nn.Module:
    backbone = tf.SwinConfig(**SWIN, out_features=STAGES)
    return tf.UperNetForSemanticSegmentation(upernet(backbone))


def upernet_convnext() -> nn.Module:
    backbone = tf.ConvNextConfig(
        hidden_sizes=[24, 32, 48, 64], depths=[1, 1, 2, 1], out_features=STAGES
    )
    return tf.UperNetForSemanticSegmentation(upernet(backbone))


def upernet(backbone: tf.PretrainedConfig) -> tf.UperNetConfig:
    return tf.UperNetConfig(
        backbone_config=backbone, hidden_size=32, use_auxiliary_head=False, num_labels=7
    )


def mask2former() -> nn.Module:
    config = tf.Mask2FormerConfig(
        backbone_config=tf.SwinConfig(**SWIN, out_features=STAGES), feature_size=32,
        mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=48, encoder_layers=2,
        decoder_layers=3, num_attention_heads=4, dim_feedforward=48, num_queries=10, num_labels=7,
    )  # fmt: skip
    return tf.Mask2FormerForUniversalSegmentation(config)


FFN = partial(replace_linears, where="*.blocks.*.mlp.fc?", kernel_num=4)
# The network, what replaces its layers, the outputs that count.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], list[str]], list[str]]] = {
    "segformer": (segformer, FFN, ["logits"]),
    "segformer, convolutions": (segformer, partial(replace_convolutions, kernel_num=4), ["logits"]),
    "upernet-swin": (upernet_swin, FFN, ["logits"]),
    "upernet-swin, convolutions": (
        upernet_swin,
        partial(replace_convolutions, where="decode_head.*", kernel_num=4),
        ["logits"],
    ),
    "upernet-convnext": (
        upernet_convnext, partial(replace_linears, where="*.pwconv?", kernel_num=4), ["logits"],
    ),
    "mask2former": (mask2former, FFN, ["class_queries_logits", "masks_queries_logits"]),
}  # fmt: skip


def check(name: str) -> float:
    """The largest error of an exported network's outputs, of each one's largest value."""
    make, replace, outputs = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()
    image, other = torch.randn(2, 1, 3, 64, 96)
    before = {key: network(pixel_values=image)[key] for key in outputs}
    names = replace(network)
    for key, value in network(pixel_values=image).items():
        if key in before:  # they start as they were
            assert relative(value, before[key]) < 1e-4, key
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, FDConv2d):
                for key, parameter in layer.named_parameters():
                    if "_fc." in key or key.startswith(("KSM_Local.conv", "FBM.")):
                        parameter.normal_(0, 0.1)
    network.eval()
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_module(network, image, bundle, outputs=outputs, input_name="pixel_values")
        expected = network(pixel_values=other)
        for native in {False, native_library()[0] is not None}:
            with open_session(bundle, native=native) as session:
                answers = session.run_raw({"pixel_values": other.numpy()})
            errors += [relative(torch.from_numpy(answers[key]), expected[key]) for key in outputs]
    print(f"{name}: {len(names)} layers replaced ({names[0]} …), error {max(errors):.1e}")
    return max(errors)


def relative(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.detach() - expected.detach()).abs().max()
    return float(difference / expected.detach().abs().max())


def main() -> int:
    with torch.no_grad():
        errors = [check(name) for name in sys.argv[1:] or NETWORKS]
    return int(not np.all(np.array(errors) <= TOLERANCE))


if __name__ == "__main__":
    raise SystemExit(main())
