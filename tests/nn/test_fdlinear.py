"""FDLinear beside its published formula, written out in float64; what it cannot be made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn import FDLinear


def lively(**arguments: Any) -> FDLinear:
    """A layer of 12 to 10 features whose attention differs from input to input."""
    torch.manual_seed(0)
    layer = FDLinear(12, 10, kernel_num=5, kernel_temp=1.0, **arguments)
    with torch.no_grad():
        for parameter in layer.KSM_Global.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return layer.eval()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    exponents = np.exp(x - x.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


GATES = {
    "sigmoid": (lambda x: 1.5 * sigmoid(x), lambda x: 2 * sigmoid(x)),
    "tanh": (lambda x: 1 + np.tanh(x),) * 2,
    "softmax": (softmax, lambda x: softmax(x) * x.shape[-1]),
}


def written_out(layer: FDLinear, x: np.ndarray, act: str) -> np.ndarray:
    """(B, N, I) float64 -> (B, N, O), bin by bin."""
    state = {name: value.double().numpy() for name, value in layer.state_dict().items()}
    hidden = x.mean(1) @ state["KSM_Global.fc.weight"].T
    hidden /= np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-6)
    hidden = np.maximum(hidden * state["KSM_Global.norm.weight"], 0)

    def head(name: str) -> np.ndarray:
        weight = state[f"KSM_Global.{name}_fc.weight"]
        return hidden @ weight.T + state[f"KSM_Global.{name}_fc.bias"]

    gate, kernel = GATES[act]
    attention = kernel(head("kernel"))
    answers = []
    for image, tokens in enumerate(x):
        spectrum = np.zeros((10, 7), complex)
        for p, (rows, columns) in enumerate(layer.indices.numpy()):
            stored = state["dft_weight"][p] @ [1, 1j] * layer.alpha
            for group in range(5):
                place = rows[group], columns[group]
                spectrum[place] += stored[place] * attention[image, 5 * p + group]
        matrix = np.fft.irfft2(spectrum, s=(10, 12))
        matrix *= gate(head("channel"))[image] * gate(head("filter"))[image][:, None]
        answers.append(tokens @ matrix.T + state.get("bias", 0))
    return np.stack(answers)


@pytest.mark.parametrize("act", GATES)
@pytest.mark.parametrize("more", [{}, {"param_ratio": 2}, {"bias": False}], ids=str)
@torch.no_grad()
def test_the_formula(act: str, more: dict[str, Any]) -> None:
    layer = lively(ksm_global_act=act, att_multi=1.5, **more)
    x = torch.randn(3, 5, 12)
    expected = written_out(layer, x.double().numpy(), act)
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@torch.no_grad()
def test_a_token_by_itself_is_a_sequence_of_one() -> None:
    layer, x = lively(), torch.randn(4, 12)
    torch.testing.assert_close(layer(x), layer(x[:, None])[:, 0])


@torch.no_grad()
def test_a_plain_weight_is_the_spectrums() -> None:
    stored, plain = lively(), lively(convert_param=False)
    assert "dft_weight" not in plain.state_dict()
    plain.KSM_Global.load_state_dict(stored.KSM_Global.state_dict())
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(plain(x), stored(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kernel_temp": None}, "only defined with kernel_num=None"),
        ({"ksm_global_act": "relu"}, "'sigmoid', 'tanh' or 'softmax', got 'relu'"),
        ({"param_reduction": 0.5, "convert_param": False}, "needs convert_param=True"),
    ],
)
def test_what_it_cannot_be_made_of(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=says):
        FDLinear(12, 10, **{"kernel_num": 5, "kernel_temp": 1.0} | arguments)


@pytest.mark.parametrize("shape", [(2, 3, 11), (0, 3, 12), (12,), (1, 2, 3, 12)], ids=str)
def test_inputs_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"non-empty \(B, N, 12\) or \(N, 12\) input, got"):
        lively()(torch.zeros(shape))


def test_arguments_of_a_convolution_are_refused_by_name():
    with pytest.raises(TypeError, match=r"FDLinear has no fbm_cfg, use_ksm_local\. Beside"):
        FDLinear(12, 10, use_ksm_local=False, fbm_cfg={})
