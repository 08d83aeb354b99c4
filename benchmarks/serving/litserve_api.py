"""The LitServe side. In a module of its own, since LitServe pickles it for its workers.

No postponed annotations here: LitServe reads them.
"""

import litserve as ls
from fastapi import Request, Response

from benchmarks.serving.baselines import image_answer, tensor_answer
from fdconv_deploy.runtime import open_session


class Api(ls.LitAPI):
    def __init__(self, bundle: str, path: str) -> None:
        super().__init__(api_path=path)
        self.bundle = bundle
        self.call = tensor_answer if path == "/tensor" else image_answer

    def setup(self, device: str) -> None:
        self.session = open_session(self.bundle, threads=1)
        self.session.warm_up()

    def decode_request(self, request: Request) -> bytes:
        return request["file"].file.read()

    def predict(self, body: bytes) -> bytes:
        return self.call(self.session, body)

    def encode_response(self, found: bytes) -> Response:
        return Response(found)
