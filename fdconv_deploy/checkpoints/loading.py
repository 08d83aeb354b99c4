"""A checkpoint file → the network in it, ready to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fdconv_deploy.checkpoints.config_parser import (
    Config,
    check_size,
    config_of,
    parse_config,
    parse_json,
)
from fdconv_deploy.checkpoints.detectron2_config import parse_yaml
from fdconv_deploy.checkpoints.frequency_order import ChosenOrder, choose_order
from fdconv_deploy.checkpoints.infer_config import infer_config
from fdconv_deploy.checkpoints.reading import Checkpoint, digest_of, read_checkpoint
from fdconv_deploy.checkpoints.settings import Inference
from fdconv_deploy.checkpoints.state_dict import SAVED_BUFFERS, dynamic_names, in_openmmlab_names
from fdconv_deploy.config import DetectorConfig, SegmentorConfig
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.nn.backbones.swin_transformer import relative_positions
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.nn.spectrum import FrequencyOrder
from fdconv_deploy.runtime.manifest import Manifest


class LoadedSegmentor(Segmentor):
    """A :class:`Segmentor` from a checkpoint.

    ``inference`` is its architecture and where each setting came from, ``order`` the order of its
    frequencies; ``weights`` names those that were chosen from several, None for the default.
    """

    inference: Inference[SegmentorConfig]
    order: ChosenOrder
    weights: str | None = None


class LoadedDetector(Detector):
    """A :class:`Detector` from a checkpoint, its attributes as :class:`LoadedSegmentor`'s."""

    inference: Inference[DetectorConfig]
    order: ChosenOrder
    weights: str | None = None


def load_checkpoint(
    source: str | Path | Checkpoint,
    *,
    config: str | Path | Config | None = None,
    overrides: Mapping[str, Any] | None = None,
    frequency_order: FrequencyOrder | Literal["auto"] = "auto",
    auxiliary: bool = False,
    require_fdconv: bool = True,
    weights: str | None = None,
) -> LoadedSegmentor | LoadedDetector:
    """Load a network from a checkpoint, without running anything in the file.

    Args:
        source: any file :func:`read_checkpoint` takes, or what it gave.
        config: the network's config (a ``.py`` or ``.json`` file), read without running it.
            By default the one the checkpoint carries.
        overrides: fields that neither weights nor config determine, e.g.
            ``{"backbone.style": "caffe"}``.
        frequency_order: how bins of equal radius are ordered, see :class:`FDConv2d`. ``"auto"``
            takes the indices that the file saves, else the order found in the weights, see
            :func:`order_of_weights`, else ``"torch"``.
        auxiliary: keep a segmentor's auxiliary head, which only training needs.
        require_fdconv: refuse a network without a single FDConv layer.
        weights: the entry to take weights from, see :func:`read_checkpoint`.

    Returns:
        The network in eval mode, float32, on the CPU: a segmentor or a detector, by the
        names of its tensors. ``.architecture`` is what was built.

    Raises:
        CheckpointError: the file can't be read, is of no network known here, its config
            contradicts it, or tensors are left over, missing or not finite.
        UnsupportedLayerError: an FDConv layer of it cannot be built.
    """
    if not isinstance(source, Checkpoint):
        source = read_checkpoint(source, weights=weights)
    settings = config_for(source, config)
    state = in_openmmlab_names(source.state_dict)
    network: LoadedSegmentor | LoadedDetector
    try:
        order = choose_order(state, frequency_order)
        inference = infer_config(
            source.state_dict, config=settings, meta=source.meta, overrides=overrides, whole=True
        )
        architecture = inference.architecture
        if isinstance(architecture, SegmentorConfig):
            if not auxiliary:
                architecture = architecture.model_copy(update={"auxiliary_head": None})
                inference = inference.model_copy(update={"architecture": architecture})
                state = {k: v for k, v in state.items() if not k.startswith("auxiliary_head.")}
            elif architecture.auxiliary_head is None:
                raise CheckpointError(
                    "it has no auxiliary head that can be used. Load it with auxiliary=False."
                )
        # On the meta device nothing is initialised: all that has data comes from the file.
        with torch.device("meta"):
            network = (
                LoadedDetector(architecture, order.used)
                if isinstance(architecture, DetectorConfig)
                else LoadedSegmentor(architecture, order.used)
            )
        network.inference = order.noted(inference)
        order.apply(network)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from None
    if require_fdconv and not dynamic_names(state):
        raise CheckpointError(
            f"{source.path} is not an FDConv checkpoint: no layer in it is one (no …KSM_Global… "
            "among its names). Expected a network trained with conv_cfg type FDConv. `fdconv "
            "convert --equivalent` makes one of a plain network; from Python, "
            "require_fdconv=False loads it as it is, and `fdconv export --baseline` exports it."
        )
    _fill(network, state, source.path)
    network.order, network.weights = order, weights
    return network.eval()


def recorded_weights(manifest: Manifest, checkpoint: str | Path) -> str | None:
    """Which weights of a file a bundle was exported from; None where it is another file."""
    recorded, source = manifest.graph.get("weights"), manifest.checkpoint
    if recorded is None or source is None or source.sha256 != digest_of(Path(checkpoint)):
        return None
    return str(recorded)


def load_segmentor(path: str | Path, **options: Any) -> LoadedSegmentor:
    """:func:`load_checkpoint` where only a segmentation network will do.

    Raises:
        CheckpointError: also if it is a detector's.
    """
    network = load_checkpoint(path, **options)
    if not isinstance(network, LoadedSegmentor):
        raise CheckpointError(f"{path} is of a detector. Expected a segmentation network here.")
    return network


def config_for(checkpoint: Checkpoint, config: str | Path | Config | None) -> Config | None:
    """The config the user gave, else the one in the checkpoint, else None."""
    if isinstance(config, Config):
        return config
    if config is None:
        return config_of(checkpoint.meta)
    given = read_config(config)
    if not given.section("model", "backbone"):
        # It takes the place of the checkpoint's own config, so it must not be an empty one.
        why = (
            f" What could not be read: {'; '.join(given.notes).rstrip('.')}." if given.notes else ""
        )
        raise CheckpointError(
            f"{config} describes no network: expected a config with model = dict(backbone=dict(…), "
            f"…), as OpenMMLab's.{why} Give another file, or leave --config out to use the "
            "checkpoint's own."
        )
    return given


def read_config(path: str | Path) -> Config:
    """Read a ``.py`` or ``.json`` config file, or detectron2's ``.yaml``, without running it.

    Raises:
        CheckpointError: no such file, not UTF-8 text, or another kind of file.
    """
    path = Path(path)
    readers = {".py": parse_config, ".json": parse_json, ".yaml": parse_yaml, ".yml": parse_yaml}
    if path.suffix not in readers:
        raise CheckpointError(
            f"{path} is not a config: expected a .py or .json file of OpenMMLab's, or the "
            "config.yaml of detectron2's."
        )
    try:
        check_size(path.stat().st_size, str(path))
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise CheckpointError(
            f"{path} cannot be read: {why}. Expected a .py, .json or .yaml config file."
        ) from None
    return readers[path.suffix](text, str(path))


def _fill(network: Segmentor | Detector, state: dict[str, Tensor], path: Path | None) -> None:
    expected = network.state_dict()
    _share(network, state, path)
    for key, value in expected.items():
        # What only training needs, and not all files have.
        if key.endswith((".num_batches_tracked", ".label_enc.weight")):
            state.setdefault(key, torch.zeros(value.shape, dtype=value.dtype))
        if key.endswith(".relative_position_index"):  # the same in every Swin of that window
            window = round(len(value) ** 0.5)
            state.setdefault(key, relative_positions(window))
        # A linear layer is a 1×1 convolution; those too narrow for FDConv are stored as either.
        if key in state and _shape_of_conv(state[key]) == _shape_of_conv(value):
            state[key] = state[key].reshape(value.shape)
    read = {f"{name}.{buffer}" for name in dynamic_layers(network) for buffer in SAVED_BUFFERS}
    unread = [key for key in state if key not in expected and key not in read]
    misfits = [
        *_grouped("missing", (key for key in expected if key not in state)),
        *_grouped("left over", (k for k in unread if not k.endswith(".num_batches_tracked"))),
    ]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if shapes:
        misfits.append(f"{len(shapes)} of another shape: {_some(shapes)}")
    if misfits:
        raise CheckpointError(
            f"{path} does not fit the network that its names and shapes describe. "
            + "; ".join(misfits)
            + ". Expected exactly the tensors of the framework's own network; if this one has "
            "parts of its own, it cannot be loaded."
        )
    weights: dict[str, Tensor] = {}
    for key, value in expected.items():
        if state[key].is_complex():
            raise CheckpointError(
                f"{path}: {key} holds complex numbers, {state[key].dtype}. Expected real ones, "
                f"{tuple(value.shape)}; a network with complex weights there cannot be built here."
            )
        tensor = state[key].to(value.dtype)
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise CheckpointError(
                f"{path}: {key} holds values that are not finite. Expected trained weights; "
                "training probably diverged, so use an earlier checkpoint."
            )
        weights[key] = tensor
    network.load_state_dict(weights, strict=True, assign=True)


def _share(network: Segmentor | Detector, state: dict[str, Tensor], path: Path | None) -> None:
    """Give every name of a parameter that several modules share what the file has under one.

    MaskDINO's boxes are made by one network under many names; files hold all of them, or one.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for group in names.values():
        given = [name for name in group if name in state]
        for name in given[1:]:
            if not torch.equal(state[name], state[given[0]]):
                raise CheckpointError(
                    f"{path}: {given[0]} and {name} differ. Expected equal tensors: in this "
                    "network they are one parameter. The file may mix two networks."
                )
        state.update({name: state[given[0]] for name in group if given})


def _shape_of_conv(weight: Tensor) -> tuple[int, ...]:
    """A weight's shape, a linear layer's as that of the 1×1 convolution it is."""
    return (*weight.shape, 1, 1) if weight.ndim == 2 else tuple(weight.shape)


def _is_finite(tensor: Tensor) -> bool:
    # A sum is several times quicker than looking at each number, and not finite if one of
    # them is not. If it is for another reason (an overflow), each is looked at.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


_CAUSES = (
    (("conv_offset",), "of deformable convolutions"),
    ((".running_mean", ".running_var"), "normalisation statistics (not a BatchNorm)"),
    ((".dft_weight", ".KSM_Global.", ".KSM_Local.", ".FBM."), "of FDConv layers"),
    ((".conv.bias", ".conv1.bias", ".conv2.bias", ".conv3.bias"), "biases of convolutions"),
)


def _grouped(what: str, keys: Iterable[str]) -> list[str]:
    """One phrase per cause, naming up to ten keys."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        cause = next((name for marks, name in _CAUSES if any(m in key for m in marks)), "tensors")
        groups.setdefault(cause, []).append(key)
    return [f"{len(found)} {cause} {what}: {_some(found)}" for cause, found in groups.items()]


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
