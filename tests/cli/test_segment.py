"""``fdconv segment`` over folders, patterns, lists and videos, on toy bundles."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.runtime import toy, toy_detector
from tests.test_cli import fdconv


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes, 32×48, batches 1 and 4."""
    return toy.make_bundle(tmp_path_factory.mktemp("segment") / "bundle").path


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_detector.make_bundle(tmp_path_factory.mktemp("segment") / "detector").path


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (40, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def film(path: Path, frames: int = 5, codec: str = "mp4v", rate: float = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), rate, (60, 40))
    assert writer.isOpened()
    for seed in range(frames):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        writer.write(cv2.resize(coarse, (60, 40), interpolation=cv2.INTER_NEAREST))
    writer.release()
    return path


def written(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


LEGEND = {"classes.json", "legend.png"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four images in three folders, one of them of two dots, and what is none."""
    root = tmp_path / "in"
    for seed, name in enumerate(("a.png", "sub/a.jpg", "sub/deep/frame.01.png", "sub/deep/b.BMP")):
        draw(root / name, seed)
    draw(root / ".cache/hidden.png")
    (root / "sub/notes.md").write_text("no image")
    return root


NAMES = ("a", "sub/a", "sub/deep/frame.01", "sub/deep/b")


def test_segment_mirrors_a_folder(bundle, tree, monkeypatch, capfd, tmp_path):
    out = tmp_path / "out"
    code, printed, err = fdconv(monkeypatch, capfd, "segment", bundle, tree, "-o", out)
    assert code == 0, err
    assert written(out) == LEGEND | {f"{n}{e}.png" for n in NAMES for e in ("", "_overlay")}
    lines = printed.splitlines()
    assert [line.partition("]")[0] for line in lines[:4]] == [f"[{n}/4" for n in range(1, 5)]
    assert lines[4].startswith("4 segmented in ")
    assert lines[5].startswith("Run by ")


def test_segment_in_batches_equals_one_by_one(bundle, tree, monkeypatch, capfd, tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    assert fdconv(monkeypatch, capfd, "segment", bundle, tree, "-o", together)[0] == 0
    for path in sorted(tree.rglob("*")):
        if path.suffix.lower() in (".png", ".jpg", ".bmp") and ".cache" not in path.parts:
            folder = alone / path.relative_to(tree).parent
            assert fdconv(monkeypatch, capfd, "segment", bundle, path, "-o", folder)[0] == 0
    for name in NAMES:
        masks = [np.asarray(Image.open(f / f"{name}.png")) for f in (together, alone)]
        assert np.array_equal(*masks)


def test_segment_leaves_out_its_own_results(bundle, tree, monkeypatch, capfd, tmp_path):
    """Those of this run's folder, and those that another run wrote into the input's folder."""
    for name in ("first", "second"):
        out = tree / name
        code, printed, err = fdconv(monkeypatch, capfd, "segment", bundle, tree, "-o", out)
        assert code == 0, err
        assert "\n4 segmented" in printed


def test_segment_takes_a_pattern(bundle, tree, monkeypatch, capfd, tmp_path):
    out = tmp_path / "out"
    arguments = ["segment", bundle, tree / "sub/**/*.png", "-o", out, "--no-overlay"]
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 0, err
    assert written(out) == LEGEND | {"deep/frame.01.png"}
    code, _, err = fdconv(monkeypatch, capfd, "segment", bundle, tree / "*.webp", "-o", out)
    assert code == 1
    assert "*.webp holds no images or videos" in err


def test_segment_takes_a_list(bundle, tree, monkeypatch, capfd, tmp_path):
    """Paths relative to the list's folder or absolute, blank lines, a byte-order mark."""
    outside = draw(tmp_path / "outside.png", 9)
    list_file = tree / "val.txt"
    list_file.write_text(f"\ufeffsub/a.jpg\n\n{outside}\n", encoding="utf-8")
    out = tmp_path / "out"
    code, _, err = fdconv(
        monkeypatch, capfd, "segment", bundle, list_file, "-o", out, "--no-overlay"
    )
    assert code == 0, err
    assert written(out) == LEGEND | {"sub/a.png", "outside.png"}
    list_file.write_text("\n")
    code, _, err = fdconv(monkeypatch, capfd, "segment", bundle, list_file, "-o", out)
    assert (code, "names no file" in err) == (1, True)


def test_segment_goes_on_where_it_was_stopped(bundle, tree, monkeypatch, capfd, tmp_path):
    out = tmp_path / "out"
    assert fdconv(monkeypatch, capfd, "segment", bundle, tree, "-o", out)[0] == 0
    (out / "sub/a.png").unlink()
    kept = (out / "a.png").stat().st_mtime_ns
    arguments = ["segment", bundle, tree, "-o", out, "--skip-existing"]
    code, printed, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 0, err
    assert printed.startswith("[1/1] ")
    assert "1 segmented, 3 skipped" in printed
    assert (out / "a.png").stat().st_mtime_ns == kept
    assert (out / "sub/a.png").exists()
    code, printed, _ = fdconv(monkeypatch, capfd, *arguments)
    assert (code, "0 segmented, 4 skipped" in printed) == (0, True)
    code, _, err = fdconv(monkeypatch, capfd, *arguments, "--overwrite")
    assert (code, "exclude each other" in err) == (2, True)


def test_segment_of_nothing_leaves_nothing(bundle, monkeypatch, capfd, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    for name in ("none.png", "clip.mp4"):
        code, _, _ = fdconv(
            monkeypatch, capfd, "segment", bundle, tmp_path / name, "-o", tmp_path / "out"
        )
        assert code == 1
        assert not (tmp_path / "out").exists()


def test_segment_looks_at_mirror_images(bundle, tree, monkeypatch, capfd, tmp_path):
    command = ["segment", bundle, tree, "-o", tmp_path / "out", "--flip", "--json"]
    code, out, err = fdconv(monkeypatch, capfd, *command)
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 4
    assert all((row["multi_scale"], row["flip"]) == ([1], True) for row in rows)
    code, _, err = fdconv(monkeypatch, capfd, *command, "--overwrite", "--multi-scale", "0.5,1")
    assert code == 1
    assert "these factors need 16x24 too" in err


def test_segment_names_classes_and_colours(bundle, tree, monkeypatch, capfd, tmp_path):
    out = tmp_path / "out"
    assert fdconv(monkeypatch, capfd, "segment", bundle, tree / "a.png", "-o", out)[0] == 0
    entries = json.loads((out / "classes.json").read_text())
    mask = Image.open(out / "a.png")
    palette = np.reshape(mask.getpalette()[: 3 * len(entries)], (-1, 3)).tolist()
    assert [entry["id"] for entry in entries] == list(range(5))
    assert [entry["name"] for entry in entries] == [f"class {n}" for n in range(5)]
    assert [entry["color"] for entry in entries] == palette
    shown = np.asarray(Image.open(out / "legend.png").convert("RGB")).reshape(-1, 3)
    assert {tuple(c) for c in palette} <= {tuple(c) for c in np.unique(shown, axis=0).tolist()}


def test_segment_does_not_mix_classes_in_a_folder(bundle, tree, monkeypatch, capfd, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "classes.json").write_text("[]")
    code, _, err = fdconv(monkeypatch, capfd, "segment", bundle, tree, "-o", out)
    assert (code, "lists other classes" in err) == (1, True)
    assert written(out) == {"classes.json"}


@pytest.mark.parametrize(("name", "codec"), [("v.mp4", "mp4v"), ("v.avi", "MJPG")])
def test_segment_takes_a_video(bundle, monkeypatch, capfd, tmp_path, name, codec):
    """Masks are those of its frames; the overlay has its length, size and rate."""
    video, out = film(tmp_path / "in/sub" / name, codec=codec), tmp_path / "out"
    code, printed, err = fdconv(
        monkeypatch, capfd, "segment", bundle, tmp_path / "in", "-o", out, "--json"
    )
    assert code == 0, err
    assert json.loads(printed)["frames"] == 5
    masks = {f"sub/v_masks/{number:06}.png" for number in range(5)}
    assert written(out) == LEGEND | masks | {"sub/v_overlay.mp4"}
    made = cv2.VideoCapture(str(out / "sub/v_overlay.mp4"))
    properties = (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FPS)
    assert [made.get(number) for number in properties] == [5, 60, 10]
    made.release()
    reader = cv2.VideoCapture(str(video))
    for number in range(5):
        _, frame = reader.read()
        cv2.imwrite(str(tmp_path / "frame.png"), frame)
        folder = tmp_path / f"alone{number}"
        image = tmp_path / "frame.png"
        assert fdconv(monkeypatch, capfd, "segment", bundle, image, "-o", folder)[0] == 0
        pair = (out / f"sub/v_masks/{number:06}.png", folder / "frame.png")
        assert np.array_equal(*(np.asarray(Image.open(path)) for path in pair))
    reader.release()


def test_segment_writes_a_mask_video(bundle, monkeypatch, capfd, tmp_path):
    video, out = film(tmp_path / "v.mp4"), tmp_path / "out"
    arguments = ["segment", bundle, video, "-o", out, "--mask-video", "--no-overlay"]
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 0, err
    assert written(out) == LEGEND | {"v_masks.mp4"}
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert (code, "exists already" in err) == (1, True)
    code, printed, _ = fdconv(monkeypatch, capfd, *arguments, "--skip-existing")
    assert (code, "1 skipped" in printed) == (0, True)


def test_segment_names_a_video_that_is_none(bundle, tree, monkeypatch, capfd, tmp_path):
    """And goes on with the rest, leaving nothing half-written of it."""
    (tree / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(200))
    out = tmp_path / "out"
    code, printed, err = fdconv(monkeypatch, capfd, "segment", bundle, tree, "-o", out)
    assert code == 1
    assert "broken.mp4 cannot be decoded" in err
    assert "4 segmented, 1 failed" in printed
    assert not [name for name in written(out) if "broken" in name]


def test_segment_says_that_a_video_is_cut(bundle, monkeypatch, capfd, tmp_path):
    """An AVI announces its frames in its head; the file ends before them."""
    video = film(tmp_path / "v.avi", frames=12, codec="MJPG")
    video.write_bytes(video.read_bytes()[: int(video.stat().st_size * 0.6)])
    code, printed, err = fdconv(
        monkeypatch, capfd, "segment", bundle, video, "-o", tmp_path / "out"
    )
    assert code == 0, err
    assert "of 12 announced: the file is cut off" in printed


def test_segment_writes_no_video_whose_legend_cannot_be_written(
    bundle, monkeypatch, capfd, tmp_path
):
    """It would count as done, and the legend never be written."""
    video, out = film(tmp_path / "v.mp4"), tmp_path / "out"
    (out / "legend.png").mkdir(parents=True)
    code, _, err = fdconv(monkeypatch, capfd, "segment", bundle, video, "-o", out)
    assert (code, ".legend." in err) == (1, True)
    assert [path.name for path in out.iterdir()] == ["legend.png"]


def test_segment_keeps_a_masks_folder_with_other_files(bundle, monkeypatch, capfd, tmp_path):
    video, out = film(tmp_path / "v.mp4"), tmp_path / "out"
    (out / "v_masks").mkdir(parents=True)
    (out / "v_masks/thesis.txt").write_text("the only copy")
    code, _, err = fdconv(monkeypatch, capfd, "segment", bundle, video, "-o", out, "--overwrite")
    assert (code, "holds other files" in err) == (1, True)
    assert (out / "v_masks/thesis.txt").exists()


def test_detector_takes_folders_and_videos(detector, tree, monkeypatch, capfd, tmp_path):
    film(tree / "v.mp4", frames=3)
    out = tmp_path / "out"
    code, _, err = fdconv(monkeypatch, capfd, "segment", detector, tree, "-o", out, "--no-overlay")
    assert code == 0, err
    images = {f"{name}{ending}" for name in NAMES for ending in (".json", ".png")}
    masks = {f"v_masks/{number:06}.png" for number in range(3)}
    assert written(out) == images | masks | {"v.jsonl"}
    lines = [json.loads(line) for line in (out / "v.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == [0, 1, 2]
    assert all(isinstance(line["instances"], list) for line in lines)


def test_segment_refuses_an_output_that_is_a_file(bundle, tree, monkeypatch, capfd, tmp_path):
    (tmp_path / "out").write_text("a file")
    code, _, err = fdconv(monkeypatch, capfd, "segment", bundle, tree, "-o", tmp_path / "out")
    assert (code, "a file is in the way" in err) == (1, True)


def test_segment_refuses_two_videos_of_one_name_at_once(bundle, monkeypatch, capfd, tmp_path):
    """Before the first is answered, as of images."""
    film(tmp_path / "in/v.mp4")
    film(tmp_path / "in/v.avi", codec="MJPG")
    out = tmp_path / "out"
    code, _, err = fdconv(monkeypatch, capfd, "segment", bundle, tmp_path / "in", "-o", out)
    assert code == 1
    assert "would both be written to v_masks" in err
    assert not out.exists()


def test_segment_says_how_to_replace_a_videos_results(bundle, monkeypatch, capfd, tmp_path):
    video, out = film(tmp_path / "v.mp4"), tmp_path / "out"
    assert fdconv(monkeypatch, capfd, "segment", bundle, video, "-o", out)[0] == 0
    code, _, err = fdconv(monkeypatch, capfd, "segment", bundle, video, "-o", out)
    assert code == 1
    assert err.endswith("replace it with --overwrite.")


def test_segment_writes_an_empty_result_anew(bundle, tree, monkeypatch, capfd, tmp_path):
    """What a full disk leaves is no result."""
    out = tmp_path / "out"
    assert fdconv(monkeypatch, capfd, "segment", bundle, tree, "-o", out)[0] == 0
    (out / "sub/a.png").write_bytes(b"")
    arguments = ["segment", bundle, tree, "-o", out, "--skip-existing"]
    code, printed, _ = fdconv(monkeypatch, capfd, *arguments)
    assert (code, "1 segmented, 3 skipped" in printed) == (0, True)
    assert Image.open(out / "sub/a.png").size == (60, 40)


def test_segment_names_a_tiff_that_is_no_rgb_picture(bundle, monkeypatch, capfd, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(
        tmp_path / "bands.tif", np.zeros((20, 30, 5), np.uint8), planarconfig="contig",
        photometric="minisblack",
    )  # fmt: skip
    code, _, err = fdconv(
        monkeypatch, capfd, "segment", bundle, tmp_path / "bands.tif", "-o", tmp_path / "out"
    )
    assert code == 1
    assert "bands.tif is a TIFF file that cannot be decoded as an 8-bit gray or RGB" in err


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:{port}", "No Ray cluster answers at 127.0.0.1:{port}"),
        ("ray://127.0.0.1:{port}", "by which this does not run"),
        ("cluster", "'cluster' is no address of a Ray cluster"),
    ],
)
def test_a_ray_that_is_not_there_is_a_sentence(
    bundle, tree, monkeypatch, capfd, tmp_path, address, said
):
    """Found out before Ray is imported, which need not be installed for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        port = free.getsockname()[1]
        arguments = ["segment", bundle, tree, "-o", tmp_path / "out"]
        code, _, err = fdconv(monkeypatch, capfd, *arguments, "--ray", address.format(port=port))
    assert (code, said.format(port=port) in err) == (1, True)
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_no_ray_is_a_sentence(bundle, tree, monkeypatch, capfd, tmp_path):
    """Ray itself would try to join it forever."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        arguments = ["segment", bundle, tree, "-o", tmp_path / "out", "--ray", address]
        code, _, err = fdconv(monkeypatch, capfd, *arguments)
        thread.join()
    assert (code, "is no gRPC server" in err) == (1, True)


def test_urls_and_workers_are_for_ray(bundle, tree, monkeypatch, capfd, tmp_path):
    for arguments in ((["s3://bucket/in"], tmp_path / "out"), ([tree], "s3://bucket/out")):
        inputs, out = arguments
        code, _, err = fdconv(monkeypatch, capfd, "segment", bundle, *inputs, "-o", out)
        assert (code, "is read and written with --ray only" in err) == (1, True)
    code, _, err = fdconv(
        monkeypatch, capfd, "segment", bundle, tree, "-o", tmp_path / "out", "--ray-cpus", 2
    )
    assert (code, "--ray-cpus is for --ray" in err) == (2, True)
