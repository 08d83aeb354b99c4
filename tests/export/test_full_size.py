"""UPerNet-R50 as published, full size: exact, and no larger than its weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks.networks import upernet
from fdconv_deploy.export.api import export_network
from fdconv_deploy.export.validation.sample_inputs import sample_tensor
from fdconv_deploy.nn import Segmentor
from tests.export.graphs import relative, run_file
from tests.reference.lively import enliven_network

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_upernet_r50(tmp_path):
    torch.manual_seed(0)
    network = Segmentor(upernet())
    # Of very few images' averages the deviation would be far too small for another's.
    images = [sample_tensor(4, (256, 256), seed=seed) for seed in (2, 3)]
    images.append(sample_tensor(2, (512, 512), seed=4))
    enliven_network(network, images=images)
    bundle = export_network(network, tmp_path / "bundle", size=(512, 512), batches=(1, 2))

    weights = [v for k, v in network.state_dict().items() if "num_batches_tracked" not in k]
    inference_bytes = sum(v.numel() * v.element_size() for v in weights)
    stored = sum(info.bytes for info in bundle.manifest.files.values())
    assert stored <= 1.05 * inference_bytes, f"{stored / inference_bytes:.3f}"

    assert bundle.manifest.parity.max_rel <= 1e-5
    x = sample_tensor(2, (512, 512), seed=1)
    with torch.inference_mode():
        single = network(x).numpy()
        network.double()  # one image after another: of both at once it holds gigabytes
        double = torch.cat([network(image[None]) for image in x.double()]).numpy()
    (found,) = run_file(bundle.model_path(2), x.numpy())
    assert relative(found, single) <= 1e-5
    assert relative(found, double) <= 1e-5
    assert (found.argmax(1) == double.argmax(1)).mean() > 0.9999
