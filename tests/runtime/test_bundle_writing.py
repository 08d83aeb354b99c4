"""Bundles are written whole or not at all, and replace nothing but bundles."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from fdconv_deploy import atomic_write
from fdconv_deploy.errors import BundleError
from fdconv_deploy.runtime import Bundle, BundleWriter
from tests.runtime import toy


def test_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    def interrupted() -> None:
        with BundleWriter(tmp_path / "b") as writer:
            (writer.path / "weights.bin").write_bytes(b"x")
            assert writer.path.parent == tmp_path
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_leaves_nothing_without_commit(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        (writer.path / "weights.bin").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_refuses_what_would_not_open(tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match="lacks the file"),
        BundleWriter(tmp_path / "b") as writer,
    ):
        writer.commit(toy.manifest(32, 48, (1,), toy.architecture()))
    assert list(tmp_path.iterdir()) == []


def test_refuses_links(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        (writer.path / "weights.bin").symlink_to("/etc/passwd")
        with pytest.raises(BundleError, match="is a link"):
            writer.commit(toy.manifest(32, 48, (1,), toy.architecture()))
    assert list(tmp_path.iterdir()) == []


def test_existing_bundle_needs_overwrite(tmp_path: Path) -> None:
    toy.make_bundle(tmp_path / "b", seed=0)
    before = (tmp_path / "b" / "weights.bin").read_bytes()
    with pytest.raises(BundleError, match="exists already"):
        toy.make_bundle(tmp_path / "b", seed=1)
    assert (tmp_path / "b" / "weights.bin").read_bytes() == before
    toy.make_bundle(tmp_path / "b", seed=1, overwrite=True)
    assert (tmp_path / "b" / "weights.bin").read_bytes() != before
    assert Bundle.open(tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_failed_overwrite_keeps_the_old_bundle(tmp_path: Path) -> None:
    toy.make_bundle(tmp_path / "b")
    with pytest.raises(RuntimeError), BundleWriter(tmp_path / "b", overwrite=True):
        raise RuntimeError
    assert Bundle.open(tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_never_replaces_another_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("years")
    with pytest.raises(BundleError, match="other things in it"):
        toy.make_bundle(tmp_path / "b", overwrite=True)
    assert (tmp_path / "b" / "thesis.tex").read_text() == "years"


def test_never_replaces_a_file_or_link(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    (tmp_path / "l").symlink_to("nowhere")
    for name in ("f", "l"):
        with pytest.raises(BundleError, match="a file or a link"):
            toy.make_bundle(tmp_path / name, overwrite=True)


def test_empty_folder_and_new_parents(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert toy.make_bundle(tmp_path / "empty")
    assert toy.make_bundle(tmp_path / "a" / "b" / "c")


def test_relative_destination_survives_chdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    writer = BundleWriter("b")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert writer.destination == tmp_path / "b"


def test_others_may_read_it(tmp_path: Path) -> None:
    bundle = toy.make_bundle(tmp_path / "b").path
    mask = os.umask(0)
    os.umask(mask)
    assert bundle.stat().st_mode & 0o777 == 0o777 & ~mask


def test_overwriting_never_shows_a_missing_bundle(tmp_path: Path) -> None:
    toy.make_bundle(tmp_path / "b")
    done, seen_missing = threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            if not (tmp_path / "b" / "manifest.json").exists():
                seen_missing.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for seed in range(8):
        toy.make_bundle(tmp_path / "b", seed=seed, overwrite=True)
    done.set()
    watcher.join()
    assert not seen_missing


def test_exchange_without_the_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_write, "_exchange_in_one_step", lambda *_: False)
    toy.make_bundle(tmp_path / "b", seed=0)
    before = (tmp_path / "b" / "weights.bin").read_bytes()
    toy.make_bundle(tmp_path / "b", seed=1, overwrite=True)
    assert (tmp_path / "b" / "weights.bin").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_an_exchange_that_fails_half_way_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_write, "_exchange_in_one_step", lambda *_: False)
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    (old / "kept").touch()
    with pytest.raises(FileNotFoundError):  # there is no new one to put in its place
        atomic_write.replace_folder(new, old)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (old / "kept").exists()


def test_a_writer_that_is_stopped_as_it_begins_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def stopped(self: Path, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        if self.name.startswith(".bundle"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", stopped)
    with pytest.raises(KeyboardInterrupt), BundleWriter(tmp_path / "bundle"):
        pass
    with pytest.raises(KeyboardInterrupt), atomic_write.atomic_folder(tmp_path / "bundle"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [atomic_write.atomic_path, atomic_write.atomic_folder])
@pytest.mark.parametrize("step", ["mkdir", "is_dir"])
def test_a_writer_that_fails_takes_no_folder_from_another(
    write: Any, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both make the folder; one goes, and the folder with it, as the other made or found it."""
    real, failing = getattr(Path, step), write(tmp_path / "new" / "failing")
    failing.__enter__()

    def late(self: Path, *arguments: Any, **options: Any) -> Any:
        nonlocal failing
        made = real(self, *arguments, **options) if step == "mkdir" else None
        if failing is not None and self.name == "new":
            gone, failing = failing, None
            gone.__exit__(KeyError, KeyError(), None)
            assert not self.exists()
        return real(self) if step == "is_dir" else made

    monkeypatch.setattr(Path, step, late)
    with write(tmp_path / "new" / "kept"):
        pass
    assert failing is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept"]
