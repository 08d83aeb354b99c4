"""A target in a process of its own: what it says, what it costs while it waits, how it ends."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fdconv_deploy.demo import packaged_checkpoint, packaged_detector
from fdconv_deploy.errors import BackendError, FDConvError
from fdconv_deploy.latency.networks import (
    RunOptions,
    Target,
    UnavailableError,
    expand_targets,
    open_target,
)
from fdconv_deploy.latency.workers import Worker, timed_runs
from fdconv_deploy.runtime.manifest import TensorSpec
from fdconv_deploy.sample_images import sample_feeds
from fdconv_deploy.serve import Settings, running
from tests.runtime import toy, toy_detector


def first(paths: list[Path], size=None, whole: bool = False, **how) -> Target:
    options = RunOptions(threads=1, size=size, whole=whole)
    return expand_targets(paths, options, **how)[0][0]


def ticks(pid: int) -> int:
    """CPU time of a process so far, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


class TestBundle:
    def test_opens_runs_and_waits_without_spinning(self, toy_bundle):
        with Worker(first([toy_bundle])) as worker:
            opened = worker.opened
            assert opened.backend == "onnxruntime-cpu"
            assert opened.size == (32, 48)
            assert opened.device == "cpu"
            assert min(opened.import_seconds, opened.load_seconds, opened.first_ms) > 0
            taken = worker.sample(5, 1)
            assert len(taken.seconds) == 5
            assert sum(taken.seconds) <= taken.wall
            assert taken.joules is None
            assert worker.opened.peak_mb >= opened.loaded_mb > 10
            assert worker.opened.cpu_seconds >= opened.cpu_seconds > 0
            if Path("/proc").is_dir():
                before = ticks(worker._process.pid)
                time.sleep(0.5)
                assert ticks(worker._process.pid) - before <= 2
        assert worker._process.returncode == 0

    def test_several_at_a_time(self, toy_bundle):
        with Worker(first([toy_bundle])) as worker:
            assert len(worker.sample(20, 3).seconds) == 60

    def test_end_to_end(self, toy_bundle):
        with Worker(first([toy_bundle], whole=True)) as worker:
            assert len(worker.sample(2, 1).seconds) == 2

    def test_any_inputs(self, tmp_path):
        bundle = toy.make_module_bundle(tmp_path / "module").path
        with Worker(first([bundle])) as worker:
            assert len(worker.sample(2, 1).seconds) == 2

    @pytest.mark.parametrize("whole", [False, True])
    def test_a_detector(self, tmp_path, whole):
        bundle = toy_detector.make_bundle(tmp_path / "detector").path
        with Worker(first([bundle], whole=whole)) as worker:
            assert len(worker.sample(2, 1).seconds) == 2
            assert worker.opened.size

    def test_a_served_detector(self, tmp_path):
        bundle = toy_detector.make_bundle(tmp_path / "detector").path
        with (
            running([bundle], settings=Settings(threads=1)) as url,
            Worker(first([], urls=[url])) as worker,
        ):
            assert worker.opened.choice.startswith("model detector")
            assert len(worker.sample(2, 2).seconds) == 4

    def test_what_is_not_there_is_told_from_what_is_wrong(self, toy_bundle, tmp_path):
        with pytest.raises(UnavailableError, match="CUDAExecutionProvider"):
            Worker(first([toy_bundle], backends=["onnxruntime-cuda"]))
        damaged = toy.make_bundle(tmp_path / "damaged").path
        target = first([damaged])
        data = (damaged / "weights.bin").read_bytes()
        (damaged / "weights.bin").write_bytes(data[:-1] + b"x")
        with pytest.raises(FDConvError, match=r"weights\.bin") as caught:
            Worker(target)
        assert not isinstance(caught.value, UnavailableError)

    def test_a_worker_that_is_killed(self, toy_bundle):
        with Worker(first([toy_bundle])) as worker:
            os.kill(worker._process.pid, signal.SIGKILL)
            with pytest.raises(FDConvError, match="was killed, most likely for want of memory"):
                worker.sample(1, 1)


class TestCheckpoint:
    @pytest.mark.parametrize("backend", ["eager", "folded"])
    def test_runs(self, backend):
        work = open_target(first([packaged_checkpoint()], backends=[backend], size=(64, 64)))
        assert work.opened.choice.startswith("PyTorch 2")
        assert work.opened.size == (64, 64)
        assert work.run().shape[:2] == (1, 11)

    @pytest.mark.parametrize("backend", ["eager", "folded"])
    def test_runs_a_detector(self, backend):
        work = open_target(first([packaged_detector()], backends=[backend], size=(64, 96)))
        assert work.opened.size == (64, 96)
        assert len(work.run()) == 5  # count, boxes, scores, labels, masks

    def test_a_detector_from_pixels_to_objects(self):
        work = open_target(first([packaged_detector()], size=(64, 96), whole=True))
        assert work.run().image_size == (64, 96)

    def test_needs_a_size(self):
        with pytest.raises(FDConvError, match=r"records no size\. Say which: --size"):
            open_target(first([packaged_checkpoint()]))

    def test_fused_needs_a_gpu(self):
        target = first([packaged_checkpoint()], backends=["fused"], size=(64, 64))
        with pytest.raises(BackendError, match="the fused kernels need an NVIDIA GPU"):
            open_target(target)


class TestTimedRuns:
    def test_threads_run_at_the_same_time(self):
        together = threading.Barrier(3)  # is passed by three runs at once alone
        seconds, _ = timed_runs(lambda: together.wait(timeout=60), 2, 3)
        assert len(seconds) == 6

    def test_seconds_are_of_the_clock_given(self):
        ticks = itertools.count()
        seconds, wall = timed_runs(lambda: None, 3, 1, lambda: float(next(ticks)))
        assert seconds == [1.0, 1.0, 1.0]
        assert wall == 7.0

    def test_what_fails_in_a_thread_is_raised(self):
        with pytest.raises(ZeroDivisionError):
            timed_runs(lambda: 1 / 0, 1, 2)

    def test_garbage_is_not_collected_meanwhile_and_is_afterwards(self):
        seen = []
        timed_runs(lambda: seen.append(gc.isenabled()), 3, 1)
        assert seen == [False] * 3
        assert gc.isenabled()


def test_a_service_that_is_not_there():
    with pytest.raises(FDConvError, match="cannot be reached"):
        Worker(first([], urls=["http://127.0.0.1:9"]))


def test_inputs():
    specs = (
        TensorSpec(name="images", shape=(2, 3, 40, 56)),
        TensorSpec(name="sizes", shape=(2, 2)),
        TensorSpec(name="other", shape=(3,)),
        TensorSpec(name="number", shape=(1,), dtype="int64"),
    )
    found = sample_feeds(specs)
    assert {name: (v.shape, str(v.dtype)) for name, v in found.items()} == {
        s.name: (s.shape, s.dtype) for s in specs
    }
    assert found["sizes"].tolist() == [[40, 56], [40, 56]]
    a, b = found["images"]
    assert np.abs(a - b).mean() > 0.1  # two pictures, not one twice
    assert 0.3 < a.std() < 3
