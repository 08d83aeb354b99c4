"""The native operators, built for the tests from the source in this tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from fdconv_deploy.ops.native import BuildError, build, compiler


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler() is None:
        pytest.skip("no C compiler for the native operators (cc, gcc, clang or $CC)")
    try:
        return build(tmp_path_factory.mktemp("native"))
    except BuildError as problem:
        pytest.fail(str(problem))
