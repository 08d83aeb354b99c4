"""Write TIFF files of several bands by rasterio (GDAL) and tifffile: see README.md."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import rasterio
import tifffile

HERE = Path(__file__).resolve().parent
FILES = HERE / "files"
HEIGHT, WIDTH = 22, 35


def bands(count: int, kind: str) -> np.ndarray:
    """(count, HEIGHT, WIDTH): every number tells its place. The tests know the same rule."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    found = np.stack([(7 * y + 3 * x + 31 * band) % 251 for band in range(count)])
    scale = {"uint8": 1, "uint16": 257, "int16": -100, "float32": 0.37}[kind]
    return (found * scale).astype(kind)


def by_gdal(name: str, count: int, kind: str, **options: object) -> None:
    profile = {"driver": "GTiff", "height": HEIGHT, "width": WIDTH, "count": count, "dtype": kind}
    with rasterio.open(
        FILES / f"gdal-{name}-{count}-{kind}.tif", "w", **profile, **options
    ) as file:
        file.write(bands(count, kind))


def by_tifffile(name: str, count: int, kind: str, *, last: bool = False, **options: object) -> None:
    array = bands(count, kind)
    array = np.ascontiguousarray(np.moveaxis(array, 0, -1)) if last else array
    tifffile.imwrite(FILES / f"tifffile-{name}-{count}-{kind}.tif", array, **options)


def main() -> None:
    """Write every file, and what GDAL reads in them."""
    warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
    FILES.mkdir(exist_ok=True)
    for count in (1, 4, 12):
        for kind in ("uint8", "uint16", "float32"):
            by_gdal("pixel", count, kind, interleave="pixel")
            by_gdal("band", count, kind, interleave="band")
    tiled = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    by_gdal("lzw", 4, "uint16", compress="lzw", predictor=2, **tiled)
    by_gdal("deflate", 12, "float32", compress="deflate", predictor=3, interleave="band", **tiled)
    by_gdal("zstd", 5, "int16", compress="zstd")
    by_gdal("bigtiff", 2, "uint8", BIGTIFF="YES")
    by_gdal("bigendian", 4, "uint16", ENDIANNESS="BIG")
    by_gdal("rgba", 4, "uint8", photometric="RGB", alpha="yes")
    by_tifffile("pages", 4, "uint16", photometric="minisblack")
    by_tifffile("pages", 12, "float32", photometric="minisblack", metadata=None)
    by_tifffile("planar", 5, "uint8", photometric="minisblack", planarconfig="separate")
    by_tifffile(
        "contiguous", 12, "uint16", last=True, photometric="minisblack", planarconfig="contig"
    )
    # Rows as pages: what imwrite makes of an array whose last axis is not known to be bands.
    by_tifffile("rows", 12, "uint8", last=True, photometric="minisblack")
    by_tifffile("imagej", 4, "uint16", imagej=True, metadata={"axes": "CYX"})
    found = {}
    for path in sorted(FILES.glob("*.tif")):
        with rasterio.open(path) as file:
            read = file.read()
        sums = read.astype(np.float64).sum(axis=(1, 2)).round(3).tolist()
        found[path.name] = {"shape": list(read.shape), "dtype": str(read.dtype), "sums": sums}
    (HERE / "read_by_gdal.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} files, {sum(p.stat().st_size for p in FILES.glob('*.tif'))} bytes")


if __name__ == "__main__":
    main()
