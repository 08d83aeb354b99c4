#!/bin/sh
# OpenCV 5.0.0 reads a TIFF file of two 16-bit bands as one band of eight bits, without a word.
#
# Seen with opencv-python-headless 5.0.0.93 and tifffile 2026.3.3 on Linux x86-64: of a valid file of
# (20, 30) pixels, two uint16 samples each, cv2.imread(..., cv2.IMREAD_UNCHANGED) gives a (20, 30)
# uint8 array of other values, where tifffile gives back the (20, 30, 2) uint16 array that was
# written. Of five float32 samples it gives None. So mmcv's LoadImageFromFile with
# color_type="unchanged" trains on something else than the file holds. Exits with 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q numpy==2.4.6 opencv-python-headless==5.0.0.93 tifffile==2026.3.3
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import cv2
import numpy as np
import tifffile

two = (np.arange(20 * 30 * 2).reshape(20, 30, 2) * 50).astype(np.uint16)
tifffile.imwrite("two.tif", two, photometric="minisblack", planarconfig="contig")
assert np.array_equal(tifffile.imread("two.tif"), two)
found = cv2.imread("two.tif", cv2.IMREAD_UNCHANGED)
print("OpenCV", cv2.__version__, "two uint16 bands:", found.shape, found.dtype)
assert found.size == 600
assert found.dtype == np.uint8
five = np.ones((20, 30, 5), np.float32)
tifffile.imwrite("five.tif", five, photometric="minisblack", planarconfig="contig")
none = cv2.imread("five.tif", cv2.IMREAD_UNCHANGED)
print("five float32 bands:", none)
assert none is None
PYTHON
