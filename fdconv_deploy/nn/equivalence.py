"""FDConv layers that start as a plain convolution: attentions at rest, spectra to suit.

At rest, no image changes anything: kernel attention is the same for every group, the others
are constants, and band modulation passes its input through. What is constant then is divided
out of the stored spectrum, so that the layer's kernel is the plain one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.fdconv import FDConv2d
from fdconv_deploy.nn.spectrum import kernel_spectrum


@torch.no_grad()
def set_spectrum(layer: FDConv2d, weight: Tensor, bias: Tensor | None = None) -> None:
    """Store a plain kernel as the published layer and converter do, attentions as they are.

    Args:
        layer: dynamic or plain.
        weight: ``(O, I, kh, kw)``.
        bias: ``(O,)`` if the layer has one.
    """
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
    if not (layer.is_dynamic and layer.convert_param):
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        return
    spectrum = kernel_spectrum(weight)
    if layer.param_reduction < 1:
        for p, (rows, columns) in enumerate(layer.indices.flatten(2).to(spectrum.device)):
            layer.dft_weight[p] = spectrum[rows, columns]
    else:
        layer.dft_weight.copy_(spectrum.expand_as(layer.dft_weight))


@torch.no_grad()
def set_equivalent(layer: FDConv2d, weight: Tensor, bias: Tensor | None = None) -> None:
    """Make a layer compute what the plain convolution of ``weight`` does; it can still learn.

    The attentions' heads are set to zero (their hidden layer is left as it is, so that
    gradients reach them), and with ``param_ratio`` P each spectrum holds a P-th.

    Args:
        layer, weight, bias: as `set_spectrum`'s.

    Raises:
        UnsupportedLayerError: ``param_reduction`` below 1 keeps part of the spectrum only.
    """
    if not layer.is_dynamic:
        set_spectrum(layer, weight, bias)
        return
    if layer.param_reduction < 1:
        raise UnsupportedLayerError(
            f"param_reduction={layer.param_reduction} keeps part of the spectrum only, so this "
            "layer cannot equal a plain convolution. Use param_reduction=1, or start from the "
            "cut spectrum without equivalence."
        )
    _rest(layer)
    # alpha undoes spectrum_scale and kernel attention's 1/(P·G); P spectra are added.
    gain = layer.param_ratio / max(layer.param_reduction, 1.0)
    heads = layer.KSM_Global
    if heads.act == "sigmoid":
        gates = (heads.channel_fc, heads.filter_fc, heads.spatial_fc)
        gain *= (heads.att_multi / 2) ** sum(gate is not None for gate in gates)
    if layer.KSM_Local is not None and layer.KSM_Local.act == "sigmoid":
        gain *= layer.KSM_Local.att_multi / 2
    set_spectrum(layer, weight / gain, bias)


def _rest(layer: FDConv2d) -> None:
    heads = layer.KSM_Global
    still: list[nn.Module | None] = [
        heads.kernel_fc,
        heads.channel_fc,
        heads.filter_fc,
        heads.spatial_fc,
    ]
    if layer.KSM_Local is not None:
        still.append(layer.KSM_Local.conv)
    if layer.FBM is not None:
        still.extend(layer.FBM.freq_weight_conv_list)
    for module in still:
        for parameter in module.parameters() if module is not None else ():
            parameter.zero_()
