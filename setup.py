"""Builds the native operators with the package, where there is a C compiler (docs/native.md)."""

import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = Path(__file__).parent / "fdconv_deploy/ops/native"
# By its path: the package itself cannot be imported before what it needs is installed.
spec = importlib.util.spec_from_file_location("native_build", NATIVE / "build.py")
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


class BuildNative(build_ext):
    """The library is no Python module: it has a name and a compiler command of its own."""

    def get_ext_filename(self, fullname: str) -> str:
        """Its own name, beside its source."""
        return str(Path(*fullname.split(".")[:-1]) / native.library_name())

    def build_extension(self, ext: Extension) -> None:
        """By its own command."""
        try:
            native.build(Path(self.get_ext_fullpath(ext.name)).parent)
        except native.BuildError as problem:
            raise CompileError(str(problem)) from problem


# The folders `export` and `serve` are installed inside `fdconv_deploy`, so that a user's own
# `export.py` or `serve.py` never meets ours.
FOLDERS = ("export", "serve")

setup(
    packages=[
        *find_packages(include=["fdconv_deploy*"]),
        *(
            f"fdconv_deploy.{package}"
            for package in find_packages(
                include=[pattern for name in FOLDERS for pattern in (name, f"{name}.*")]
            )
        ),
    ],
    package_dir={f"fdconv_deploy.{name}": name for name in FOLDERS},
    # Optional: without a compiler the package installs all the same, and says so.
    ext_modules=[Extension("fdconv_deploy.ops.native.library", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
    # It calls nothing of Python's, so one wheel serves every version.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
