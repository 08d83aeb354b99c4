"""From a bundle to answers. Nothing here imports torch or onnx.

>>> from fdconv_deploy.runtime import open_session, read_image   # doctest: +SKIP
>>> with open_session("bundle") as session:                      # doctest: +SKIP
...     answer = session.segment(read_image("street.jpg"))
"""

from .backends import BACKENDS
from .bundle import Bundle, BundleWriter
from .decoding import read_image
from .detection import Detection
from .manifest import Manifest, ParityReport
from .segmentation import Segmentation
from .session import Session, open_session

__all__ = [
    "BACKENDS",
    "Bundle",
    "BundleWriter",
    "Detection",
    "Manifest",
    "ParityReport",
    "Segmentation",
    "Session",
    "open_session",
    "read_image",
]
