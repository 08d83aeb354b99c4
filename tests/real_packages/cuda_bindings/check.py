"""`benchmarks/gpu/own_ptx.py` through the real cuda-bindings; README.md says how to run it."""

import subprocess
import sys

EXPECTED = """load 3 parameters
function rows of 0x10
launch 0x20 grid 2 40 1 block 128 1 1 shared 4096 stream (nil) extra (nil) with 16 32 48
"""


def main() -> None:
    if sys.argv[1:] == ["--launch"]:
        from cuda.bindings import driver

        from benchmarks.gpu.own_ptx import Driver
        from fdconv_deploy.ops.compile_kernels import CompiledKernel

        kernel = CompiledKernel("rows", 90, "3 parameters", ("u64",) * 3, 128, 4096)
        Driver(driver).launch(kernel, (2, 40, 1), [16, 32, 48])
        return
    command = [sys.executable, "-m", "tests.real_packages.cuda_bindings.check", "--launch"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(said, end="")
    if said != EXPECTED:
        sys.exit(f"expected was\n{EXPECTED}")


if __name__ == "__main__":
    main()
