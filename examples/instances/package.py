"""A trained detector's state → what is packaged: checkpoint, annotations, record."""

from __future__ import annotations

from pathlib import Path

from examples.instances.data import draw_scene, images_of
from examples.instances.network import start
from examples.streets.instances import CLASSES, coco_annotations, draw_instances
from examples.training.attention_statistics import FRAMES, SIZES, frames, recalibrate
from examples.training.layers import dynamic_layers
from examples.training.record import attention_spread, origins, write_json
from examples.training.run import load_state
from examples.training.scenes import normalise
from fdconv_deploy.checkpoints import save_checkpoint
from fdconv_deploy.demo import HELD_OUT_SEEDS

# Scenes after the packaged held-out ones, for a steadier number.
EVALUATION_SEEDS = range(HELD_OUT_SEEDS.stop, HELD_OUT_SEEDS.stop + 200)


def package(state_file: Path, out: Path) -> None:
    """Write ``instances.pth``, ``heldout/instances.json`` and the record, without scores yet.

    The backbone's attention statistics are measured anew first.
    """
    state = load_state(state_file)
    network = start()
    network.load_state_dict(state["network"])
    network.eval()
    recalibrate(network.backbone, frames(network.architecture.preprocessing))
    (out / "heldout").mkdir(parents=True, exist_ok=True)
    save_checkpoint(out / "instances.pth", network, network.architecture)
    annotations = coco_annotations(
        (f"{index:03d}.png", draw_instances(seed)[1]) for index, seed in enumerate(HELD_OUT_SEEDS)
    )
    write_json(out / "heldout" / "instances.json", annotations, indent=None)
    seen = images_of([draw_scene(seed) for seed in EVALUATION_SEEDS[:64]])
    preprocessing = network.architecture.preprocessing
    record = origins(CLASSES, state["recipe"], EVALUATION_SEEDS) | {
        "parameters": sum(p.numel() for p in network.parameters()),
        "dynamic_layers": len(dynamic_layers(network)),
        "steps": state["step"],
        "training_seconds": round(state["seconds"], 1),
        "attention_statistics": {"sizes": SIZES, "frames": FRAMES},
        "attention_spread": attention_spread(
            network.backbone, (normalise(preprocessing, image[None]) for image in seen)
        ),
    }
    write_json(out / "instances_training.json", record)
