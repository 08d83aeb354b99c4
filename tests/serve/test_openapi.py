"""The OpenAPI document: complete, and every example of the form it describes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from fdconv_deploy.serve import Settings, create_app

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def contents(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where, media type, content) of every answer and request body."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method.upper()} {path}"
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                yield where, kind, content
            for status, response in operation["responses"].items():
                for kind, content in response.get("content", {}).items():
                    yield f"{where} {status}", kind, content


def examples(document: dict[str, Any], content: dict[str, Any]) -> list[Any]:
    schema = content["schema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return [content["example"]] if "example" in content else schema.get("examples", [])


def test_every_json_has_an_example_of_its_form(document: dict[str, Any]) -> None:
    checked = 0
    for where, kind, content in contents(document):
        if "json" not in kind:
            continue
        root = {**content["schema"], "components": document["components"]}
        found = examples(document, content)
        properties = document["components"]["schemas"].get(
            content["schema"].get("$ref", "").rpartition("/")[2], {}
        )
        # A form of one word needs none.
        assert found or "Health" in properties.get("title", ""), where
        for example in found:
            jsonschema.Draft202012Validator(root).validate(example)
            checked += 1
    assert checked > 90


def test_every_parameter_has_an_example_or_says_its_values(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                text = str(parameter)
                assert any(word in text for word in ("'example", "'enum'", "'default'")), (
                    path,
                    parameter,
                )


def test_examples_name_the_model_that_is_served(document: dict[str, Any]) -> None:
    answers = document["paths"]["/v1/models/{name}"]["get"]["responses"]
    assert answers["200"]["content"]["application/json"]["example"]["name"] == "street"


def test_parameters_of_an_address_are_in_its_order(document: dict[str, Any]) -> None:
    """Generators make arguments of them: by position, in each start of the service the same."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            named = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
            assert named == re.findall(r"{(\w+)}", path)


def test_descriptions_name_no_modules(document: dict[str, Any]) -> None:
    """They are read by those who have no source at hand."""
    assert re.findall(r"\b[a-z_]+\.[A-Z]\w+", json.dumps(document)) == []


def test_what_is_always_there_is_required(document: dict[str, Any]) -> None:
    assert document["components"]["schemas"]["ServerReady"]["required"] == ["ready"]


def test_errors_are_one_model(document: dict[str, Any]) -> None:
    """Generators name a model after every schema that stands where it is used, and drop doubles."""
    for where, kind, content in contents(document):
        if kind == "application/problem+json":
            assert content["schema"] == {"$ref": "#/components/schemas/Problem"}, where
    schemas = document["components"]["schemas"]
    assert {"title", "status", "detail", "request_id"} <= set(schemas["Problem"]["required"])
    assert not {"HTTPValidationError", "ValidationError"} & set(schemas)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found = set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document)))
    assert found <= set(document["components"]["schemas"])
    assert len(found) > 20


def test_the_document_is_written_once(bundles: list[Path]) -> None:
    """Whatever becomes of the document in memory, the bytes are those of the first answer."""
    app = create_app(bundles, Settings(threads=1))
    with TestClient(app) as client:
        first = client.get("/openapi.json")
        app.openapi()["info"]["title"] = "written again"
        answers = [first, client.get("/openapi.json")]
    assert answers[0].content == answers[1].content
    assert answers[0].headers["content-type"] == "application/json"


def test_json_is_the_first_form_of_an_answer(document: dict[str, Any]) -> None:
    """Generators make their functions of the first form they know; bytes would be one."""
    forms: dict[str, list[str]] = {}
    for where, kind, _ in contents(document):
        forms.setdefault(where, []).append(kind)
    several = [kinds for kinds in forms.values() if "application/json" in kinds]
    assert {kinds[0] for kinds in several} == {"application/json"}
    assert max(map(len, several)) > 1
