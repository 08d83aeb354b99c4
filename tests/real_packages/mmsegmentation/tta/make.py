"""Write what mmsegmentation's test-time augmentation makes of images: see README.md."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PIXELS = HERE.parents[1] / "mmsegmentation_pixels"
sys.path[:0] = [str(HERE.parents[3])]

# The networks' layers, registered by the script that made them.
_spec = spec_from_file_location("networks", HERE.parent / "make.py")
assert _spec is not None
assert _spec.loader is not None
_spec.loader.exec_module(module_from_spec(_spec))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmcv.transforms import Compose  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.dataset import pseudo_collate  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmseg.models.segmentors import SegTTAModel  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from mmseg.utils import register_all_modules  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
CASES = {
    "psp": HERE.parent / "psp.pth",
    "aspp": HERE.parent / "aspp.pth",
    "psp_aligned": HERE.parent / "psp_aligned.pth",
    "gray": PIXELS / "gray.pth",
}


class Recording(SegTTAModel):
    """mmsegmentation's own, which tells what it merged."""

    def merge_preds(self, data_samples_list: list[Any]) -> list[Any]:
        """Merge, and keep what was merged."""
        (self.merged,) = ([one.seg_logits.data.clone() for one in s] for s in data_samples_list)
        return super().merge_preds(data_samples_list)


def pixels(name: str) -> np.ndarray:
    """As ``LoadImageFromFile`` gives them: BGR, or one band."""
    if name == "gray":
        return cv2.imread(str(PIXELS / "gray.png"), cv2.IMREAD_GRAYSCALE)[:, :, None]
    return np.ascontiguousarray(load_file(HERE.parent / f"{name}.safetensors")["image"][..., ::-1])


@torch.no_grad()
def write(name: str, path: Path) -> None:
    """The answers for one network, with mirror images and without."""
    saved = torch.load(path, weights_only=False)  # noqa: TID251 - our own file
    config = Config.fromstring(saved["meta"]["cfg"], ".py")
    network = revert_sync_batchnorm(MODELS.build(config.model))
    network.load_state_dict(saved["state_dict"])
    image, found = pixels(name), {}
    for flip in (False, True):
        mirrors = [{"type": "RandomFlip", "prob": float(p), "direction": "horizontal"}
                   for p in range(1 + flip)]  # fmt: skip
        sizes = [{"type": "Resize", "scale_factor": f, "keep_ratio": True} for f in FACTORS]
        steps = [sizes, mirrors, [{"type": "PackSegInputs"}]]
        shape = image.shape[:2]
        data = Compose([{"type": "TestTimeAug", "transforms": steps}])(
            {"img": image, "img_path": "", "img_shape": shape, "ori_shape": shape}
        )
        tta = Recording(network).eval()
        (answer,) = tta.test_step(pseudo_collate([data]))
        end = "_flip" if flip else ""
        # Of one output, these are sigmoids already.
        views = [one if len(one) == 1 else one.softmax(0) for one in tta.merged]
        assert len(views) == len(FACTORS) * (1 + flip)
        found[f"mean{end}"] = torch.stack(views).mean(0).numpy()
        found[f"labels{end}"] = answer.pred_sem_seg.data.squeeze(0).numpy().astype(np.uint8)
    np.savez_compressed(HERE / f"{name}.npz", image=image, **found)
    for end in ("", "_flip"):
        print(f"{name}{end}", np.bincount(found[f"labels{end}"].reshape(-1)))


def main() -> None:
    """Write every case."""
    register_all_modules()
    for name, path in CASES.items():
        write(name, path)


if __name__ == "__main__":
    main()
