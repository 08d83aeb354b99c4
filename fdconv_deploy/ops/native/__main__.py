"""``python -m fdconv_deploy.ops.native``: build the native operators into the package.

Where OpenVINO is installed, its extension is built, too.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from fdconv_deploy.environment import installed_version
from fdconv_deploy.ops.native import FOLDER, BuildError, build, build_openvino


def main() -> int:
    """Build, say where; 1 where it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m fdconv_deploy.ops.native", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument(
        "--optional", action="store_true", help="succeed, saying so, where it cannot be done"
    )
    options = parser.parse_args()
    try:
        print(f"Built {build(options.folder)}")
        # Not imported: that takes a second and tells Google Analytics.
        if (found := find_spec("openvino")) and (version := installed_version("openvino")):
            package = Path(str(found.origin)).parent
            print(f"Built {build_openvino(options.folder, package, version)}")
    except BuildError as problem:
        print(problem, file=sys.stderr)
        return 0 if options.optional else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
