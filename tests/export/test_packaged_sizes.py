"""README's export and verify on the packaged checkpoints, at every size it names."""

from __future__ import annotations

import pytest

from fdconv_deploy.demo import packaged_checkpoint, packaged_detector
from fdconv_deploy.export.api import export_checkpoint
from fdconv_deploy.export.validation.verify import load_exported, verify_bundle
from fdconv_deploy.runtime import open_session

SIZES = [(64, 64), (192, 256), (512, 512), (1024, 2048)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("kind", ["segmentor", "detector"])
def test_packaged_checkpoints_export_and_verify(kind, size, tmp_path):
    checkpoint = packaged_checkpoint() if kind == "segmentor" else packaged_detector()
    made = export_checkpoint(checkpoint, tmp_path / "bundle", size=size, batches=(1, 4))
    assert all(found["equal"] for found in made.manifest.graph["exactness"].values())
    with open_session(made.path) as session:
        verdicts = verify_bundle(session, load_exported(session, checkpoint))
    assert [verdict.equal for verdict in verdicts] == [True, True]
