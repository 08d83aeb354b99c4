"""The protocol's REST form by hand, and what of it is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from fdconv_deploy.serve import Settings, create_app
from fdconv_deploy.serve.kserve import tensors
from fdconv_deploy.serve.model_cards import model_card
from fdconv_deploy.serve.routes import kserve
from tests.runtime import toy
from tests.serve.conftest import wait_until_ready
from tests.serve.test_refusals import refused

URL = "/v2/models/street/infer"


@pytest.fixture
def call(pixels) -> dict:
    return {
        "id": "7",
        "inputs": [
            {
                "name": "images",
                "shape": [1, 32, 48, 3],
                "datatype": "UINT8",
                "data": pixels[0].reshape(-1).tolist(),
            }
        ],
        "outputs": [{"name": "labels"}],
    }


def test_infer_answers_json(client: TestClient, session, pixels, call) -> None:
    answer = client.post(URL, json=call)
    found = tensors.InferAnswer.model_validate(answer.json())
    assert (found.model_name, found.model_version, found.id) == ("street", "1", "7")
    labels = np.array(found.outputs[0].data).reshape(found.outputs[0].shape)
    assert np.array_equal(labels[0], session.segment(pixels[0]).labels)


def test_infer_takes_nested_data(client: TestClient, pixels, call) -> None:
    flat = client.post(URL, json=call).json()["outputs"]
    call["inputs"][0]["data"] = pixels[:1].tolist()
    assert client.post(URL, json=call).json()["outputs"] == flat


@pytest.mark.parametrize("piece", [60, 61, 62, 63, 10_000])
@pytest.mark.parametrize("indent", [None, 1])
def test_infer_reads_data_wherever_it_is_cut(
    client: TestClient, pixels, call, monkeypatch, piece: int, indent: int | None
) -> None:
    expected = client.post(URL, json=call).json()
    call["inputs"][0]["data"] = pixels[:1].tolist()
    call["parameters"] = {"data": [[1], [-2.5e3]]}  # not the input's
    monkeypatch.setattr(tensors, "_PIECE_BYTES", piece)
    answer = client.post(URL, content=json.dumps(call, indent=indent))
    assert answer.json() == expected, answer.text[:300]


@pytest.mark.parametrize("piece", [60, 61, 62, 63, 10_000])
@pytest.mark.parametrize(
    "wrong",
    [
        *("[[7, {}]", "[[7, {},], 7]", "[[, {}]]", "[7,, {}]", "[7 {}]", "[[7, {}]]]", "[7], {}"),
        *("[]{}", "[[7], {}]", "[7, [{}]]", "[7, '{}']", "[7, {}, {'a': 7}]", "[7, {}, [[]]"),
        "[07, {}]",
    ],
)
def test_infer_refuses_data_wherever_it_is_cut(
    client: TestClient, call, monkeypatch, piece: int, wrong: str
) -> None:
    """As many numbers as the shape says, but no list of them."""
    monkeypatch.setattr(tensors, "_PIECE_BYTES", piece)
    data = wrong.replace("{}", ", ".join(["7"] * (4608 - wrong.count("7")))).replace("'", '"')
    given = json.dumps(change(call, data="?")["inputs"]).replace('"?"', data)
    refused(client.post(URL, content=f'{{"inputs": {given}}}'), 400)


def test_infer_works_on_numbers_in_pieces(client: TestClient, pixels, call, monkeypatch) -> None:
    """One call on all would keep the event loop's thread from Python's lock, however long."""
    call["inputs"][0] |= {"shape": [16, 32, 48, 3], "data": [7] * 16 * 4608}
    expected = client.post(URL, json=call)
    sizes: list[int] = []

    def noted(real):
        def call(given):
            sizes.append(len(given))
            return real(given)

        return call

    monkeypatch.setattr(tensors, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(tensors, "PIECE", 300)
    monkeypatch.setattr(tensors, "from_json", noted(tensors.from_json))
    monkeypatch.setattr(tensors, "to_json", noted(tensors.to_json))
    assert client.post(URL, json=call).content == expected.content
    assert len(sizes) > 16 * (4608 * 2 // 1000 + 32 * 48 // 300)
    assert max(sizes) < 1010


def test_infer_takes_little_json_beside_the_data(client: TestClient, call) -> None:
    for size, status in ((60_000, 200), (70_000, 400)):
        answer = client.post(URL, json={**call, "id": "," * size})
        assert answer.status_code == status, answer.text[:300]


def test_infer_examples_in_openapi_are_valid(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]["InferCall"]
    assert tensors.InferCall.model_validate(schema["examples"][0])


def change(call: dict, **changes) -> dict:
    return {**call, "inputs": [{**call["inputs"][0], **changes}]}


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "x"},
        {"name": None},
        {"shape": [1, 32, 48]},
        {"shape": "1"},
        {"shape": [True, 32, 48, 3]},
        {"shape": [0, 32, 48, 3]},
        {"shape": [-1, 32, 48, 3]},
        {"shape": [10**30, 32, 48, 3]},
        {"datatype": "FP16"},
        {"datatype": 3},
        {"data": None},
        {"data": [1, 2, 3]},
        {"data": [256] * 4608},
        {"data": [0.5] * 4608},
        {"data": ["x"] * 4608},
        {"data": [[1], [1, 2]] * 2000},
        {"data": [None] * 4608},
        {"data": [True] * 4608},
        {"data": ["7"] * 4608},
        {"data": [1] * 4607 + [True]},
        {"data": [[1] * 48 + [None] * 96] * 32},
        {"data": [10**400] + [0] * 4607},
        {"data": {"a": 1}},
        {"parameters": {"binary_data_size": 4608}},
    ],
)
def test_infer_refuses_wrong_inputs(client: TestClient, call, changes) -> None:
    answer = client.post(URL, json=change(call, **changes))
    assert answer.json()["error"] == refused(answer, 400)


@pytest.mark.parametrize(
    "number", ["1e39", "-1e39", "1e400", "NaN", "Infinity", "null", "true", '"1"']
)
def test_infer_refuses_what_is_no_float32(client: TestClient, number: str) -> None:
    """As Triton does; taken, it would be NaN or another number all the way to the answer."""
    data = ",".join(["0.5"] * 4607 + [number])
    body = (
        '{"inputs": [{"name": "images", "shape": [1, 3, 32, 48], "datatype": "FP32", '
        f'"data": [{data}]}}]}}'
    )
    assert "list of" in refused(client.post(URL, content=body), 400)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_infer_takes_the_largest_float32(client: TestClient) -> None:
    """Its shortest decimal form is larger than itself as a float64."""
    given = {"name": "images", "shape": [1, 3, 32, 48], "datatype": "FP32"}
    numbers = [3.4028235e38] + [0] * 4607
    call = {"inputs": [{**given, "data": numbers}], "outputs": [{"name": "labels"}]}
    assert client.post(URL, json=call).status_code == 200


@pytest.mark.parametrize("value", ["0", "-1", "x", "", "nan", "1e10"])
def test_time_limit_of_the_header_is_the_same_on_both_ways(
    client: TestClient, call, png: bytes, value: str
) -> None:
    headers = {"X-Timeout-Ms": value}
    assert client.post(URL, json=call, headers=headers).status_code == 422
    answer = client.post(
        "/v1/segment", content=png, headers={**headers, "Content-Type": "image/png"}
    )
    assert answer.status_code == 422


def test_time_limit_of_the_header_holds(bundles, call, png: bytes) -> None:
    """It and the parameter: the earlier one."""
    with TestClient(create_app(bundles, Settings(threads=1, deadline_ms=7_200_000))) as client:
        wait_until_ready(client)
        service = client.app.state.service
        found: list[float] = []
        real = service.scheduler.run

        async def run(lane, inputs, deadline):
            found.append(deadline - time.perf_counter())
            return await real(lane, inputs, deadline)

        service.scheduler.run = run
        for headers, timeout in (({"X-Timeout-Ms": "3600000"}, 0), ({}, 3_600_000_000)):
            call["parameters"] = {"timeout": timeout}
            assert client.post(URL, json=call, headers=headers).status_code == 200
        client.post(
            "/v1/segment",
            content=png,
            headers={"X-Timeout-Ms": "3600000", "Content-Type": "image/png"},
        )
    assert len(found) == 3
    assert all(2000 < left <= 3600 for left in found)  # of 7200 without


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"inputs": []}',
        b'{"inputs": [1]}',
        b'{"inputs": [{}, {}]}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_infer_refuses_wrong_bodies(client: TestClient, body: bytes) -> None:
    refused(client.post(URL, content=body), 400)


@pytest.mark.parametrize("outputs", [1, [1], [{}], [{"name": 3}], [{"name": "x"}]])
def test_infer_refuses_wrong_outputs(client: TestClient, call, outputs) -> None:
    refused(client.post(URL, json={**call, "outputs": outputs}), 400)


def test_infer_takes_null_for_what_is_optional(client: TestClient, call) -> None:
    given = {**call["inputs"][0], "parameters": None}
    answer = client.post(
        URL, json={"id": None, "parameters": None, "inputs": [given], "outputs": None}
    )
    assert answer.status_code == 200, answer.text
    assert [output["name"] for output in answer.json()["outputs"]] == ["logits", "labels"]
    assert "id" not in answer.json()


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"id": 7}, "id"),
        ({"parameters": [1]}, "parameters"),
        ({"parameters": {"binary_data_output": "yes"}}, "parameters.binary_data_output"),
        ({"outputs": [{"name": "labels", "parameters": 1}]}, "outputs.0.parameters"),
        ({"inputs": [{"name": "images"}]}, "inputs.0.shape"),
    ],
)
def test_infer_says_where_a_field_is_wrong(client: TestClient, call, changes, where: str) -> None:
    assert f"at {where}: " in refused(client.post(URL, json={**call, **changes}), 400)


@pytest.mark.parametrize("timeout", ["1", -1, 1.5, True])
def test_infer_refuses_wrong_timeouts(client: TestClient, call, timeout) -> None:
    refused(client.post(URL, json={**call, "parameters": {"timeout": timeout}}), 400)


@pytest.mark.parametrize("length", ["x", "-1", "99999999", "1e3", "9" * 50, "²"])
def test_infer_refuses_wrong_header_lengths(client: TestClient, call, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length.encode("utf-8")}
    refused(client.post(URL, content=json.dumps(call), headers=headers), 400)


@pytest.mark.parametrize("size", [0, 4607, 4609, -1, "4608", None])
def test_infer_refuses_wrong_binary_sizes(client: TestClient, call, size) -> None:
    wanted = change(call, parameters={"binary_data_size": size})
    del wanted["inputs"][0]["data"]
    head = json.dumps(wanted).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    refused(client.post(URL, content=head + bytes(4608), headers=headers), 400)


def test_infer_answers_values_that_are_not_finite_in_binary_only(client: TestClient) -> None:
    """JSON has no NaN; the answer says to ask in binary, which works."""
    tensor = np.full((1, 3, 32, 48), np.nan, np.float32)
    given = {"name": "images", "shape": [1, 3, 32, 48], "datatype": "FP32"}
    given["parameters"] = {"binary_data_size": tensor.nbytes}  # type: ignore[assignment]
    for binary, status in ((False, 400), (True, 200)):
        head = json.dumps(
            {"inputs": [given], "parameters": {"binary_data_output": binary}}
        ).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        answer = client.post(URL, content=head + tensor.tobytes(), headers=headers)
        assert answer.status_code == status, answer.text


def test_infer_of_a_model_that_was_replaced_by_another(
    bundles, call, monkeypatch, tmp_path: Path
) -> None:
    """Between reading the request and running it: it is of no use to the new one."""
    real, other = kserve.read_request, toy.make_bundle(tmp_path / "b", height=64, width=96)
    with TestClient(create_app(bundles[:1], Settings(threads=1))) as client:
        wait_until_ready(client)
        version = client.app.state.service.repository.get("street").version

        def replaced(*given):
            found = real(*given)
            version.card = model_card("street", other, default=True)
            return found

        monkeypatch.setattr(kserve, "read_request", replaced)
        answer = client.post(URL, json=call)
        assert "send the request again" in refused(answer, 503)
        assert answer.headers["retry-after"]


def test_repository_control_is_off_by_default(client: TestClient) -> None:
    for what in ("load", "unload"):
        answer = client.post(f"/v2/repository/models/street/{what}")
        assert "--model-control" in refused(answer, 403)
    assert client.post("/v2/repository/index").json()[0]["state"] == "READY"
