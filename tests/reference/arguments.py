"""Constructor arguments in all combinations that make a layer, as a strategy.

The published ones, and what public copies of the published class have of their own: another
normalisation, masks made per call, an odd number of columns.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

BANDS: list[dict[str, Any] | None] = [
    None,
    {},
    dict(k_list=[4, 2], lowfreq_att=True),
    dict(k_list=[3], act="tanh"),
    dict(act="softmax", spatial_group=2, k_list=[2, 4]),
    dict(spatial_group=65, spatial_kernel=1, k_list=[2, 4, 8]),
    dict(k_list=[2, 8], max_size=(31, 48), lowfreq_att=True, spatial_group=2),
    dict(k_list=[2, 4, 8], masks="per_call"),
    dict(k_list=[4, 3], lowfreq_att=True, act="tanh", spatial_group=65, masks="per_call"),
]


def _in_pairs(bands: dict[str, Any] | None) -> bool:
    return bands is not None and bands.get("spatial_group") == 2


@st.composite
def layer_arguments(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, int], int]:
    """Arguments of a small dynamic layer, an input size that suits it, and a seed."""
    kernel = draw(st.sampled_from([1, 3, (1, 3), 2, 5, (3, 1)]))
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    only_kernel = kernel == (3, 1) or draw(st.integers(0, 4)) == 0
    acts = ["sigmoid", "tanh", "softmax"] if only_kernel else ["sigmoid", "tanh"]
    convert = draw(st.integers(0, 3)) > 0
    ins, outs = draw(st.sampled_from([18, 19, 20, 24])), draw(st.sampled_from([17, 18, 21, 24]))
    reduction = draw(st.sampled_from([1.0, 2.0, *([0.5] if convert else [])]))
    kept = int(outs * height * (ins * width // 2 + 1) * min(reduction, 1))
    groups = draw(st.sampled_from([g for g in range(1, 25) if kept % g == 0]))
    ratio = draw(st.sampled_from([1, 2])) if groups > 1 else 2
    dilation, stride = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, (2, 1)]))
    paddings = [0, 1, (2, 1), "valid", *(["same"] if stride == 1 else [])]
    arguments = dict(
        in_channels=ins, out_channels=outs, kernel_size=kernel, stride=stride,
        padding=draw(st.sampled_from(paddings)), dilation=dilation, bias=draw(st.booleans()),
        kernel_num=groups, use_fdconv_if_k_in=[1, 2, 3, 5],
        use_fbm_if_k_in=draw(st.sampled_from([[3], [1, 2, 5], []])),
        use_fbm_for_stride=draw(st.booleans()), kernel_temp=draw(st.sampled_from([1.0, 0.7])),
        temp=draw(st.sampled_from([None, 1.5])), att_multi=draw(st.sampled_from([2.0, 1.5])),
        param_ratio=ratio, param_reduction=reduction, ksm_only_kernel_att=only_kernel,
        use_ksm_local=draw(st.booleans()),
        ksm_local_act=draw(st.sampled_from(["sigmoid", "tanh"])),
        ksm_global_act=draw(st.sampled_from(acts)), convert_param=convert,
        fbm_cfg=draw(st.sampled_from([b for b in BANDS if ins % 2 == 0 or not _in_pairs(b)])),
        ksm_global_norm=draw(st.sampled_from(["batch", "batch", "group", "none"])),
    )  # fmt: skip
    least = [dilation * (k - 1) + 1 for k in (height, width)]
    size = (draw(st.integers(least[0], 23)), draw(st.integers(least[1], 23)))
    return arguments, size, draw(st.integers(0, 10**6))
