"""GPU kernels compiled to PTX and machine code for every supported GPU, without one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install triton)", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("Triton interprets here (TRITON_INTERPRET=1)", allow_module_level=True)

from benchmarks.gpu.resources import (
    executed,
    resident_programs,
    resources,
    warp_instructions,
)
from benchmarks.gpu.shapes import KERNEL_NUM, RESNET50, LayerShape, layer_sizes
from fdconv_deploy.errors import BackendError
from fdconv_deploy.folding.cuda import CapturedNetwork, FusedConv2d, FusedNetwork, fuse_network
from fdconv_deploy.folding.layer import fold_layer
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.ops.attention.launch import (
    GateSizes,
    Pooling,
    finish_launch,
    gates_launch,
    pool_launch,
)
from fdconv_deploy.ops.compile_kernels import (
    CAPABILITIES,
    CompiledKernel,
    compile_kernel,
    without_hidden_parameters,
)
from fdconv_deploy.ops.frequency_assembly.launch import (
    attend_rows_launch,
    column_launch,
    row_launch,
)
from fdconv_deploy.ops.frequency_band_modulation.launch import (
    BandSizes,
    combination_launch,
    filter_launch,
    modulate_launch,
    project_launch,
)
from fdconv_deploy.ops.launch import KernelLaunch
from tests.reference.lively import enliven, lively_input

# Without opting in to more, which TensorRT's plugins cannot.
SHARED_MEMORY = 48 * 1024
BANDS = combination_launch(
    channels=64, pixels=128 * 128, groups=1, weighted=3, terms=4, sigmoid=True,
    channels_last=True, dtype="float16",
)  # fmt: skip
POOLING = Pooling(256, 1024, 64)
BAND_SIZES = BandSizes(64, 24, 24, 14, 2, (7, 4, 2), 1, 3, window=3)


def attended(shape: LayerShape) -> KernelLaunch:
    """The first kernel of such a layer with everything the published one has."""
    sizes = layer_sizes(shape.out_channels, shape.in_channels, shape.kernel)
    pooling = Pooling(shape.in_channels, shape.feature**2, max(16, shape.in_channels // 16))
    gates = GateSizes(sizes.heads, False, False, 0.0, True, True, True, 1e-5)
    launch = attend_rows_launch(pooling, gates, KERNEL_NUM, sizes)
    assert launch is not None
    return launch


SMALL = {
    "pool": pool_launch(POOLING, channels_last=True, dtype="float16"),
    "finish": finish_launch(
        POOLING,
        channels_last=True,
        dtype="float16",
        biased=True,
        added=True,
        relu=True,
        pooled=True,
    ),
    "gates": gates_launch(
        POOLING, GateSizes(400, True, True, 1e-5, True, True, averaged=True, average_epsilon=1e-5)
    ),
    "projected bands": project_launch(BAND_SIZES, channels_last=True, dtype="float16"),
    "filtered bands": filter_launch(BAND_SIZES, channels_last=True, dtype="float16"),
    "modulated bands": modulate_launch(
        BAND_SIZES, channels_last=True, dtype="float16", biased=True, sigmoid=True
    ),
    "projected bands, float32": project_launch(BAND_SIZES, channels_last=False, dtype="float32"),
    "filtered bands, float32, logits elsewhere": filter_launch(
        replace(BAND_SIZES, window=0), channels_last=False, dtype="float32"
    ),
    "attentions and rows": attended(LayerShape(64, 64, 1, 32, 1, 1)),
    "rows": row_launch(layer_sizes(64, 64, 1)),
    "columns": column_launch(layer_sizes(64, 64, 1), channels_last=True, dtype="float16"),
    "bands": BANDS,
}


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(request, tmp_path_factory):
    """Triton keeps what it compiled; here, between test runs, with pytest's own cache if any."""
    before = os.environ.get("TRITON_CACHE_DIR")
    cache = getattr(request.config, "cache", None)  # none under `-p no:cacheprovider`
    folder = cache.mkdir("triton") if cache else tmp_path_factory.mktemp("triton")
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder))
    yield
    if before is None:
        os.environ.pop("TRITON_CACHE_DIR", None)


def check(launch: KernelLaunch, capability: int) -> CompiledKernel:
    kernel = compile_kernel(launch, capability)
    assert kernel.parameters == ("u64",) * len(launch.arguments)
    entry = re.search(r"\.entry .*?\{", kernel.ptx, re.DOTALL)
    assert entry is not None
    assert entry.group().count(".param") == len(launch.arguments)
    assert kernel.threads == launch.threads
    assert kernel.shared <= SHARED_MEMORY
    assert f".target sm_{capability}" in kernel.ptx
    used = resources(kernel)  # ptxas takes it
    assert used.registers * kernel.threads <= 65536
    print(
        f"{launch.kernel} sm_{capability}: {len(kernel.parameters)} parameters, "
        f"{kernel.threads} threads, {kernel.shared} bytes shared, {used}"
    )
    return kernel


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", SMALL)
def test_every_kernel_on_every_gpu(name, capability, proved):
    kernel = check(SMALL[name], capability)
    assert resources(kernel).spill_stores == 0
    targets = ", ".join(map(str, CAPABILITIES))
    proved(f"GPU kernels compiled and assembled, no spills, for sm_ {targets}", 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shape", RESNET50, ids=str)
def test_every_layer_of_a_resnet50_without_spills(shape, capability):
    sizes = layer_sizes(shape.out_channels, shape.in_channels, shape.kernel)
    for launch in (
        row_launch(sizes),
        attended(shape),
        column_launch(sizes),
        column_launch(sizes, channels_last=True, dtype="float16"),
    ):
        assert resources(check(launch, capability)).spill_stores == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", [(29, 58, 1), (20, 18, 3), (21, 18, 1), (2048, 2048, 3)], ids=str)
def test_odd_and_large_layers(shape):
    for launch in (row_launch(layer_sizes(*shape)), column_launch(layer_sizes(*shape))):
        check(launch, 90)


# Pointers to what other kernels of the network write; all others are to constants.
WRITTEN = set(
    "x y shortcut partial gates average half weight projected given logits filtered lows".split()
)


def read_before_waiting(launch: KernelLaunch) -> set[str]:
    """Arguments that a kernel's addresses come from before it waits, in its PTX."""
    ptx = compile_kernel(launch.early(), 90).ptx
    assert ptx.count("griddepcontrol.launch_dependents") >= 1, launch.kernel
    head, found, _ = ptx.partition("griddepcontrol.wait")
    assert found, launch.kernel
    names = [name for name, _ in launch.arguments]
    origins: dict[str, set[str]] = {}
    seen: set[str] = set()
    for line in head.splitlines():
        registers = re.findall(r"%\w+", line)
        if parameter := re.search(r"ld\.param.*_param_(\d+)\]", line):
            origins[registers[0]] = {names[int(parameter[1])]}
            continue
        origin = set().union(*(origins.get(r, set()) for r in registers))
        if re.search(r"\b(ld|st|atom|red|cp\.async)\b.*\.global", line):
            seen |= origin
        else:
            for register in registers:
                origins[register] = origins.get(register, set()) | origin
    return seen


@pytest.mark.parametrize("name", SMALL)
def test_a_kernel_that_starts_early_waits_before_it_reads_what_others_wrote(name):
    assert "griddepcontrol" not in compile_kernel(SMALL[name], 90).ptx
    seen = read_before_waiting(SMALL[name])
    assert not seen & WRITTEN
    # What is looked for can be found.
    assert seen == {"gates": {"heads", "head_bias"}, "finish": {"bias"}}.get(name, seen)


@pytest.mark.parametrize("name", ["finish", "gates", "attentions and rows"])
def test_activations_pass_on_what_is_not_a_number(name):
    """As PyTorch's do; the interpreter's maximum always does."""
    code = compile_kernel(SMALL[name], 90).ptx
    assert set(re.findall(r"\bmax\.(\S*)f32", code)) == {"NaN."}


def test_an_older_instruction_set_on_request():
    newest = compile_kernel(BANDS, 80)
    older = compile_kernel(BANDS, 80, ptx_version=80)
    assert older.ptx_version == "8.0"
    assert newest.ptx_version > "8.0"
    assert resources(older).registers > 0


def test_compiling_takes_no_torch():
    """`fdconv build` compiles plugins where torch need not be."""
    code = (
        "import sys, fdconv_deploy.ops.compile_kernels as c;"
        "import fdconv_deploy.ops.frequency_assembly.launch, fdconv_deploy.ops.attention.launch;"
        "import fdconv_deploy.ops.frequency_band_modulation.launch;"
        "[c.kernel_function(n) for n in ('row_kernel', 'gates_kernel', 'combination_kernel')];"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


HEAD = ".visible .entry kernel(\n\t.param .u64 .ptr a,\n\t.param .u64 b,\n\t.param .u64 c\n)\n"


def test_hidden_parameters_go():
    ptx, types = without_hidden_parameters(HEAD + "{ ld.param.b64 %r, [a]; }", "kernel")
    assert types == ("u64",)
    assert " b" not in ptx
    assert "[a]" in ptx


def test_a_kernel_that_reads_its_hidden_parameters_is_refused():
    with pytest.raises(BackendError, match="scratch pointer c"):
        without_hidden_parameters(HEAD + "{ ld.param.b64 %r, [c]; }", "kernel")


def fused_layer() -> FusedConv2d:
    return FusedConv2d(fold_layer(enliven(FDConv2d(18, 20, 1)), (5, 5), name="deep"))


def test_a_layer_on_the_cpu_is_refused_in_a_sentence():
    with pytest.raises(BackendError, match=r"pool_kernel runs on an NVIDIA GPU.*on cpu"):
        fused_layer()(lively_input((1, 18, 5, 5)))


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 18, 5, 6), torch.zeros(1, 18, 5, 5, dtype=torch.float16)]
)
def test_a_layer_takes_its_own_size_and_type_only(x):
    with pytest.raises(BackendError, match=r"'deep'.*torch\.float32 inputs \(B, 18, 5, 5\)"):
        fused_layer()(x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_networks_are_refused_in_a_sentence():
    network = torch.nn.Sequential(enliven(FDConv2d(18, 20, 1)))
    x = lively_input((1, 18, 5, 5))
    with pytest.raises(BackendError, match=r"need an NVIDIA GPU.*fold_network"):
        fuse_network(network.eval(), x)
    fused = FusedNetwork(network, torch.float32, channels_last=False, shape=(1, 18, 5, 5))
    with pytest.raises(BackendError, match="need an NVIDIA GPU"):
        CapturedNetwork(fused, x)


CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FADD R1, R1, R2 ;
.L_x_1:
        /*0020*/              @!P0 LDG.E R3, desc[UR4][R4.64] ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
        /*0070*/                   NOP;
"""


@pytest.mark.parametrize(
    ("trips", "instructions"),
    [([3, 5], 2 + 3 * (2 + 5 * 2)), ([1, 3, 1, 5], 38), ([4], 2 + 4 * (2 + 4 * 2)), ([], 6)],
)
def test_instructions_in_loops_count_as_often_as_they_run(trips, instructions):
    assert executed(CODE, trips) == instructions


def test_instructions_of_a_kernel():
    kernel = compile_kernel(SMALL["rows"], 90)
    assert 100 < warp_instructions(kernel) < 1000
    assert resident_programs(resources(kernel), kernel) == 32
