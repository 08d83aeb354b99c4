"""Where a bundle's engines lie: within it, and only what can be trusted."""

from __future__ import annotations

from pathlib import Path

import pytest

from fdconv_deploy.errors import BundleError
from fdconv_deploy.runtime import Bundle
from fdconv_deploy.runtime.backends.tensorrt_engines import (
    FOLDER,
    INDEX,
    EngineIndex,
    engines_folder,
    read_index,
)


def test_no_engines_and_no_folder_until_it_is_asked_for(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    assert read_index(bundle) == EngineIndex()
    assert not (bundle_copy / FOLDER).exists()
    assert engines_folder(bundle) == bundle_copy / FOLDER
    assert (bundle_copy / FOLDER).is_dir()


def test_a_folder_that_cannot_be_made(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    (bundle_copy / FOLDER).touch()
    with pytest.raises(BundleError, match=r"cannot be made \(File exists\).*make it writable"):
        engines_folder(bundle)


def test_a_folder_that_leads_outside(bundle_copy: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    outside = tmp_path / "outside"
    outside.mkdir()
    (bundle_copy / FOLDER).symlink_to(outside)
    with pytest.raises(BundleError, match=r"leads outside the bundle\. Remove the link"):
        engines_folder(bundle)


def test_an_index_of_gigabytes_is_not_read(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    engines_folder(bundle)
    with (bundle_copy / INDEX).open("wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(BundleError, match=r"is too large.*fdconv build"):
        read_index(bundle)
