"""``fdconv segment --ray`` on a Ray that each run starts, with toy bundles."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fdconv_deploy.runtime import open_session
from fdconv_deploy.runtime.input_files import sources_at
from fdconv_deploy.runtime.result_files import segment_files
from tests.cli.test_segment import draw, written
from tests.runtime import toy, toy_detector

pytest.importorskip("ray.data", reason="needs pip install 'ray[data]'")

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 500


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_bundle(tmp_path_factory.mktemp("ray") / "bundle").path


@pytest.fixture
def ray_folder(monkeypatch) -> Iterator[Path]:
    """Ray's own files; a short path, since its sockets lie there."""
    folder = Path(tempfile.mkdtemp(prefix="r"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    until(lambda: not ray_processes(folder), "Ray's processes end")
    shutil.rmtree(folder)


def ray_processes(folder: Path) -> list[psutil.Process]:
    """Every process that was started by a Ray of this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == str(folder) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "fdconv_deploy", "segment", *map(str, arguments)]
    command += ["--ray", "local", "--ray-cpus", "1"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=250)
    return process.returncode, out, err


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each result whose image is done: a second writing would change both."""
    names = written(folder)
    done = {n for n in names if "/" in n and n.replace("_overlay.png", ".png") in names}
    stats = {name: (folder / name).stat() for name in done if not Path(name).name.startswith(".")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def masks(folder: Path) -> int:
    return sum("_overlay" not in name for name in files(folder))


def contents(folder: Path) -> dict[str, bytes]:
    """Of all but what a killed writer left behind, hidden."""
    names = (name for name in written(folder) if not Path(name).name.startswith("."))
    return {name: (folder / name).read_bytes() for name in names}


def by_session(bundle: Path, folder: Path, out: Path) -> dict[str, bytes]:
    with open_session(bundle) as session:
        list(segment_files(session, sources_at([folder], out), out))
    return contents(out)


def test_a_killed_driver_and_a_killed_worker_cost_nothing(bundle, ray_folder, tmp_path):
    """500 images: interrupted, resumed, a worker killed; each is written once, as by a session."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    for number in range(IMAGES):
        draw(photos / str(number % 7) / f"{number}.png", number)

    driver = start(bundle, photos, "-o", out)
    until(lambda: out.exists() and masks(out) >= 40, "results appear")
    driver.send_signal(signal.SIGKILL)
    finish(driver)
    until(lambda: not ray_processes(ray_folder), "Ray ends with its driver")
    first, masks_before = files(out), masks(out)
    assert 40 <= masks_before < IMAGES

    driver = start(bundle, photos, "-o", out, "--skip-existing")
    until(lambda: masks(out) >= masks_before + 40, "the run goes on")
    driver.send_signal(signal.SIGTERM)
    code, _, err = finish(driver)
    assert (code, "***" in err) == (130, False)  # Ray would show its stack
    masks_before = masks(out)

    driver = start(bundle, photos, "-o", out, "--skip-existing")
    until(lambda: masks(out) >= masks_before + 40, "the run goes on")
    worker = next(
        process
        for process in psutil.Process(driver.pid).children(recursive=True)
        if "_Worker" in " ".join(process.cmdline())
    )
    worker.kill()
    second = files(out)
    code, printed, err = finish(driver)
    assert code == 0, err
    lines = printed.splitlines()
    assert lines[-2].startswith(f"{IMAGES - masks_before} segmented, {masks_before} skipped")
    assert all(line.startswith("[") for line in lines[:-2])
    assert first.items() <= second.items() <= files(out).items()
    assert contents(out) == by_session(bundle, photos, tmp_path / "alone")
    assert masks(out) == IMAGES


def test_objects_and_what_cannot_be_read(ray_folder, tmp_path):
    """A detector; a file that is no image, an empty one and a video do not stop the rest."""
    detector = toy_detector.make_bundle(tmp_path / "detector").path
    photos, out, alone = (tmp_path / name for name in ("photos", "out", "alone"))
    for number in range(3):
        draw(photos / f"{number}.png", number)
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "empty.jpg").touch()
    code, printed, err = finish(start(detector, photos, "-o", out, "--json"))
    assert code == 1
    rows = [json.loads(line) for line in printed.splitlines()]
    assert sorted(Path(row["image"]).name for row in rows if "error" in row) == [
        "broken.png",
        "empty.jpg",
    ]
    assert "2 of 5 files could not be segmented" in err
    assert "Traceback" not in err
    expected = by_session(detector, photos, alone)
    assert contents(out).keys() == expected.keys()
    for name, data in expected.items():
        if name.endswith(".json"):
            found, wanted = (json.loads(text) for text in (contents(out)[name], data))
            assert found["instances"] == wanted["instances"]
            assert found["image"] == wanted["image"]
        else:
            assert contents(out)[name] == data
    film = photos / "drive.mp4"
    film.touch()
    code, _, err = finish(start(detector, film, "-o", out))
    assert (code, "is a video. Segment videos without --ray." in err) == (1, True)


def test_a_backend_that_workers_lack_is_a_sentence(bundle, ray_folder, tmp_path):
    image = draw(tmp_path / "a.png")
    code, _, err = finish(start(bundle, image, "-o", tmp_path / "out", "--backend", "none"))
    assert code == 1
    assert "error: " in err
    assert "Traceback" not in err


def test_object_stores(bundle, ray_folder, tmp_path, monkeypatch):
    """An S3 server's objects: read, written, skipped when they exist."""
    server_module = pytest.importorskip("moto.server", reason="needs pip install 'moto[server,s3]'")
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="bucket")
        photos = tmp_path / "photos"
        for number in range(3):
            path = draw(photos / "deep" / f"{number}.png", number)
            client.upload_file(str(path), "bucket", f"in/deep/{number}.png")
        client.put_object(Bucket="bucket", Key="in/void.png", Body=b"")
        client.put_object(Bucket="bucket", Key="in/.hidden/a.png", Body=b"")

        def url(key: str) -> str:
            return f"s3://bucket/{key}?endpoint_override={host}:{port}&scheme=http&region=us-east-1"

        def objects() -> dict[str, bytes]:
            listed = client.list_objects_v2(Bucket="bucket", Prefix="in/out/")["Contents"]
            get = client.get_object
            return {
                one["Key"].removeprefix("in/out/"): get(Bucket="bucket", Key=one["Key"])[
                    "Body"
                ].read()
                for one in listed
            }

        code, printed, err = finish(start(bundle, url("in"), "-o", url("in/out")))
        assert code == 1
        assert "The image s3://bucket/in/void.png is an empty file." in err
        assert "3 segmented, 1 failed" in printed
        assert objects() == by_session(bundle, photos, tmp_path / "alone")
        client.delete_object(Bucket="bucket", Key="in/out/deep/1.png")
        again = start(bundle, url("in"), "-o", url("in/out"), "--skip-existing", "--json")
        code, printed, err = finish(again)
        rows = [json.loads(line) for line in printed.splitlines()]
        done = [row["mask"] for row in rows if "error" not in row]
        assert done == ["s3://bucket/in/out/deep/1.png"]
        assert len(objects()) == 8
        code, _, err = finish(start(bundle, url("in"), "-o", url("in/out")))
        assert (code, "exists already" in err) == (1, True)
    finally:
        server.stop()
