"""UPerNet-R50 as published, full size: exact, and no larger than its weights."""

from __future__ import annotations

import copy

import pytest
import torch

from export.inputs import made_up_images
from export.pipeline import export_segmentor
from fdconv_deploy.architecture import Architecture, BackboneConfig, FDConvConfig, HeadConfig
from fdconv_deploy.nn import build_segmentor
from tests.export.graphs import relative, run_file
from tests.reference.lively import enliven_network

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_upernet_r50(tmp_path):
    torch.manual_seed(0)
    architecture = Architecture(
        backbone=BackboneConfig(depth=50, conv=FDConvConfig(kernel_num=64)),
        decode_head=HeadConfig(
            type="UPerHead",
            in_channels=(256, 512, 1024, 2048),
            in_index=(0, 1, 2, 3),
            channels=512,
            num_classes=150,
        ),
    )
    network = build_segmentor(architecture)
    enliven_network(network, batch=4)
    bundle = export_segmentor(network, tmp_path / "bundle", size=(512, 512), batches=(1, 2))

    weights = [v for k, v in network.state_dict().items() if "num_batches_tracked" not in k]
    inference_bytes = sum(v.numel() * v.element_size() for v in weights)
    stored = sum(info.bytes for info in bundle.manifest.files.values())
    assert stored <= 1.05 * inference_bytes, f"{stored / inference_bytes:.3f}"

    assert bundle.manifest.parity.max_rel <= 1e-5
    x = made_up_images(2, (512, 512), seed=1)
    with torch.no_grad():
        single = network(x).numpy()
        double = copy.deepcopy(network).double()(x.double()).numpy()
    (found,) = run_file(bundle.model_path(2), x.numpy())
    assert relative(found, single) <= 1e-5
    assert relative(found, double) <= 1e-5
    assert (found.argmax(1) == double.argmax(1)).mean() > 0.9999
