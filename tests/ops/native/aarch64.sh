#!/bin/bash
# The native operators on AArch64: built by Zig's clang, run by an emulated processor (qemu-user)
# in ONNX Runtime's own AArch64 wheel, against the answers that this machine's vectors gave.
#
#     tests/ops/native/aarch64.sh FOLDER      from the repository's root, on Debian 12 x86-64, in
#                                             the environment that runs the tests; about 10 minutes
#
# Debian's packages are unpacked in FOLDER (300 MB); nothing is installed.
set -euo pipefail
folder=$(realpath -m "$1")
mkdir -p "$folder"/{debs,host,apt/lists/partial,apt/cache/archives/partial,root,site,wheels,runs,lib}

# The emulator, of this machine's architecture.
(cd "$folder/debs" && apt-get download qemu-user libcapstone4 liburing2)
for deb in "$folder"/debs/*.deb; do dpkg-deb -x "$deb" "$folder/host"; done

# Python for AArch64, and what it needs.
echo 'deb [arch=arm64] http://deb.debian.org/debian bookworm main' > "$folder/apt/sources.list"
touch "$folder/apt/status"
apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root
     -o Dir::Etc::sourcelist="$folder/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
     -o Dir::State="$folder/apt" -o Dir::State::status="$folder/apt/status"
     -o Dir::Cache="$folder/apt/cache")
"${apt[@]}" update
"${apt[@]}" install -y --download-only --no-install-recommends \
    python3.11-minimal libpython3.11-stdlib libstdc++6
for deb in "$folder"/apt/cache/archives/*.deb; do dpkg-deb -x "$deb" "$folder/root"; done

# ONNX Runtime asks /proc and /sys which processor this is: a Neoverse N1 of two cores.
cpus="$folder/root/sys/devices/system/cpu"
mkdir -p "$folder/root/proc" "$cpus"/cpu{0,1}
for file in possible present online; do echo 0-1 > "$cpus/$file"; done
for core in 0 1; do
    printf 'processor\t: %d\nFeatures\t: fp asimd aes pmull sha1 sha2 crc32 atomics asimdrdm\n' $core
    printf 'CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\n'
    printf 'CPU part\t: 0xd0c\nCPU revision\t: 1\n\n'
done > "$folder/root/proc/cpuinfo"

# ONNX Runtime and numpy as here.
wanted=$(python -c 'import numpy, onnxruntime as o; print(f"numpy=={numpy.__version__}", f"onnxruntime=={o.__version__}")')
# shellcheck disable=SC2086
python3 -m pip download -q --no-deps -d "$folder/wheels" --python-version 3.11 --only-binary :all: \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 $wanted
for wheel in "$folder"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$folder/site"; done

python3 -m venv "$folder/zig"
"$folder/zig/bin/pip" install -q ziglang==0.17.1
CC="$folder/zig/bin/python -m ziglang cc -target aarch64-linux-gnu.2.31" \
    python -m fdconv_deploy.ops.native --folder "$folder/lib"
python -m fdconv_deploy.ops.native --folder "$folder/host"

python -m tests.ops.native.replay record "$folder/runs" "$(ls "$folder"/host/fdconv_native_*.so)"
LD_LIBRARY_PATH="$folder/host/usr/lib/x86_64-linux-gnu" PYTHONPATH="$folder/site" \
    ORT_DISABLE_TELEMETRY=1 \
    "$folder/host/usr/bin/qemu-aarch64" -U LD_LIBRARY_PATH -L "$folder/root" \
    "$folder/root/usr/bin/python3.11" tests/ops/native/replay.py replay "$folder/runs" \
    "$(ls "$folder"/lib/fdconv_native_*.so)"
