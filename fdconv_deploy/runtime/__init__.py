"""From a bundle to answers. Nothing here imports torch or onnx.

>>> from fdconv_deploy.runtime import open_session, read_image   # doctest: +SKIP
>>> with open_session("bundle") as session:                      # doctest: +SKIP
...     answer = session.segment(read_image("street.jpg"))
"""

from fdconv_deploy.runtime.backends import BACKENDS, Tensors
from fdconv_deploy.runtime.bundle import Bundle, BundleWriter
from fdconv_deploy.runtime.detection import Detection
from fdconv_deploy.runtime.graph_runner import GraphRunner, Runner
from fdconv_deploy.runtime.images import read_image
from fdconv_deploy.runtime.manifest import Manifest, ParityReport
from fdconv_deploy.runtime.segmentation import MultiScale, Segmentation
from fdconv_deploy.runtime.session import Session, open_session

__all__ = [
    "BACKENDS",
    "Bundle",
    "BundleWriter",
    "Detection",
    "GraphRunner",
    "Manifest",
    "MultiScale",
    "ParityReport",
    "Runner",
    "Segmentation",
    "Session",
    "Tensors",
    "open_session",
    "read_image",
]
