"""A side in a process of its own: what it says, what it costs while it waits, how it ends."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from fdconv_deploy.serve import Settings, running

from fdconv_deploy.demo import packaged_checkpoint, packaged_detector
from fdconv_deploy.errors import BackendError, FDConvError
from fdconv_deploy.latency.images import feeds, picture
from fdconv_deploy.latency.open_target import open_work
from fdconv_deploy.latency.targets import Side, UnavailableError, plan
from fdconv_deploy.latency.workers import turn
from fdconv_deploy.latency.worker_handle import Child
from fdconv_deploy.runtime.manifest import TensorSpec
from tests.runtime import toy, toy_detector


def first(paths: list[Path], **options) -> Side:
    return plan(paths, threads=1, **options).sides[0]


def ticks(pid: int) -> int:
    """CPU time of a process so far, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


class TestBundle:
    def test_opens_runs_and_waits_without_spinning(self, toy_bundle):
        with Child(first([toy_bundle])) as child:
            opened = child.opened
            assert opened["details"]["backend"] == "onnxruntime-cpu"
            assert opened["details"]["size"] == [32, 48]
            assert opened["device"] == "cpu"
            for key in ("import_seconds", "load_seconds", "first_seconds", "empty_mb"):
                assert opened[key] > 0
            taken = child.turn(5, 1)
            assert len(taken.seconds) == 5
            assert sum(taken.seconds) <= taken.wall
            assert taken.joules is None
            assert child.peak_mb >= opened["loaded_mb"] >= opened["empty_mb"] > 10
            if Path("/proc").is_dir():
                before = ticks(child._process.pid)
                time.sleep(0.5)
                assert ticks(child._process.pid) - before <= 2
        assert child._process.returncode == 0

    def test_several_at_a_time(self, toy_bundle):
        with Child(first([toy_bundle])) as child:
            assert len(child.turn(20, 3).seconds) == 60

    def test_end_to_end(self, toy_bundle):
        with Child(first([toy_bundle], whole=True)) as child:
            assert len(child.turn(2, 1).seconds) == 2

    def test_any_inputs(self, tmp_path):
        bundle = toy.make_module_bundle(tmp_path / "module").path
        with Child(first([bundle])) as child:
            assert len(child.turn(2, 1).seconds) == 2

    @pytest.mark.parametrize("whole", [False, True])
    def test_a_detector(self, tmp_path, whole):
        bundle = toy_detector.make_bundle(tmp_path / "detector").path
        with Child(first([bundle], whole=whole)) as child:
            assert len(child.turn(2, 1).seconds) == 2
            assert child.opened["details"]["size"]

    def test_a_served_detector(self, tmp_path):
        bundle = toy_detector.make_bundle(tmp_path / "detector").path
        with (
            running([bundle], settings=Settings(threads=1)) as url,
            Child(first([], urls=[url])) as child,
        ):
            assert child.opened["details"]["choice"].startswith("model detector")
            assert len(child.turn(2, 2).seconds) == 4

    def test_what_is_not_there_is_told_from_what_is_wrong(self, toy_bundle, tmp_path):
        with pytest.raises(UnavailableError, match="CUDAExecutionProvider"):
            Child(first([toy_bundle], backends=["onnxruntime-cuda"]))
        damaged = toy.make_bundle(tmp_path / "damaged").path
        side = first([damaged])
        data = (damaged / "weights.bin").read_bytes()
        (damaged / "weights.bin").write_bytes(data[:-1] + b"x")
        with pytest.raises(FDConvError, match=r"weights\.bin") as caught:
            Child(side)
        assert not isinstance(caught.value, UnavailableError)

    def test_a_child_that_is_killed(self, toy_bundle):
        with Child(first([toy_bundle])) as child:
            os.kill(child._process.pid, signal.SIGKILL)
            with pytest.raises(FDConvError, match="was killed, most likely for want of memory"):
                child.turn(1, 1)


class TestCheckpoint:
    @pytest.mark.parametrize("backend", ["eager", "folded"])
    def test_runs(self, backend):
        work = open_work(first([packaged_checkpoint()], backends=[backend], size=(64, 64)))
        assert work.details["choice"].startswith("PyTorch 2")
        assert work.details["size"] == (64, 64)
        assert work.run().shape[:2] == (1, 11)

    @pytest.mark.parametrize("backend", ["eager", "folded"])
    def test_runs_a_detector(self, backend):
        work = open_work(first([packaged_detector()], backends=[backend], size=(64, 96)))
        assert work.details["size"] == (64, 96)
        assert len(work.run()) == 5  # count, boxes, scores, labels, masks

    def test_a_detector_from_pixels_to_objects(self):
        work = open_work(first([packaged_detector()], size=(64, 96), whole=True))
        assert work.run().found.image_size == (64, 96)

    def test_needs_a_size(self):
        with pytest.raises(FDConvError, match=r"records no size\. Say which: --size"):
            open_work(first([packaged_checkpoint()]))

    def test_fused_needs_a_gpu(self):
        side = first([packaged_checkpoint()], backends=["fused"], size=(64, 64))
        with pytest.raises(BackendError, match="the fused kernels need an NVIDIA GPU"):
            open_work(side)


class TestTurn:
    def test_threads_run_at_the_same_time(self):
        seconds, wall = turn(lambda: time.sleep(0.05), 2, 3)
        assert len(seconds) == 6
        assert all(0.05 <= second < 0.2 for second in seconds)
        assert wall < sum(seconds) * 0.7

    def test_what_fails_in_a_thread_fails_the_turn(self):
        with pytest.raises(ZeroDivisionError):
            turn(lambda: 1 / 0, 1, 2)

    def test_garbage_is_not_collected_meanwhile_and_is_afterwards(self):
        seen = []
        turn(lambda: seen.append(gc.isenabled()), 3, 1)
        assert seen == [False] * 3
        assert gc.isenabled()


def test_a_service_that_is_not_there():
    with pytest.raises(FDConvError, match="cannot be reached"):
        Child(first([], urls=["http://127.0.0.1:9"]))


def test_inputs():
    specs = (
        TensorSpec(name="images", shape=(2, 3, 40, 56)),
        TensorSpec(name="sizes", shape=(2, 2)),
        TensorSpec(name="other", shape=(3,)),
        TensorSpec(name="number", shape=(1,), dtype="int64"),
    )
    found = feeds(specs, None)
    assert {name: (v.shape, str(v.dtype)) for name, v in found.items()} == {
        s.name: (s.shape, s.dtype) for s in specs
    }
    assert found["sizes"].tolist() == [[40, 56], [40, 56]]
    a, b = found["images"]
    assert np.abs(a - b).mean() > 0.1  # two pictures, not one twice
    assert 0.3 < a.std() < 3
    assert picture((16, 24)).shape == (16, 24, 3)
