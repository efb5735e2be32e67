"""The request model takes exactly what its JSON schema describes, and its round trip changes nothing."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from raexmc_ray.client import Client, _body
from raexmc_ray.serve.api import make_api
from raexmc_ray.serve.guard import Tokens
from raexmc_ray.serve.schema import PredictRequest, ServeSettings

VALIDATOR = jsonschema.Draft202012Validator(PredictRequest.model_json_schema())
scalars = st.none() | st.booleans() | st.integers(-2, 20_000) | st.floats(-2, 200) | st.text(max_size=5)
texts = st.lists(st.text(max_size=8) | st.just("vim"), max_size=4)
neighbours = st.dictionaries(st.sampled_from(["joint", "instances", "labels", "x"]), scalars, max_size=3)
requests = st.fixed_dictionaries(
    {"texts": texts | scalars},
    optional={
        "k": scalars,
        "lambda": scalars,
        "temperature": scalars,
        "neighbours": neighbours | scalars,
        "evidence": scalars,
        "labels_allowed": texts | scalars,
        "labels_blocked": texts | scalars,
        "allow_partial": scalars,
        "x": scalars,
    },
)
valid_requests = st.fixed_dictionaries(
    {"texts": st.lists(st.text(min_size=1, max_size=8).map(lambda text: text + "x"), min_size=1, max_size=4)},
    optional={
        "k": st.none() | st.integers(1, 1000) | st.integers(1, 9).map(float),
        "lambda": st.none() | st.floats(0, 1) | st.integers(0, 1),
        "temperature": st.none() | st.floats(1e-4, 100),
        "neighbours": st.none()
        | st.fixed_dictionaries({"joint": st.integers(1, 16384)})
        | st.fixed_dictionaries({"instances": st.integers(1, 16384)}, optional={"labels": st.integers(0, 16384)}),
        "evidence": st.integers(0, 100),
        "labels_allowed": st.none() | st.lists(st.text(min_size=1, max_size=5), max_size=3),
        "allow_partial": st.booleans(),
    },
)


def accepts(content: dict[str, Any]) -> bool:
    try:
        PredictRequest.model_validate(content)
    except ValidationError:
        return False
    return True


@settings(max_examples=1000, deadline=None)
@given(requests)
def test_it_takes_what_its_schema_describes(content: dict[str, Any]) -> None:
    assert accepts(content) == VALIDATOR.is_valid(content)


@settings(max_examples=300, deadline=None)
@given(valid_requests)
def test_a_request_survives_its_way_over_the_wire(content: dict[str, Any]) -> None:
    assert VALIDATOR.is_valid(content)
    request = PredictRequest.model_validate(content)
    wire = request.model_dump_json(by_alias=True, exclude_none=True)
    assert PredictRequest.model_validate_json(wire) == request
    assert PredictRequest.model_validate(request.model_dump(by_alias=True)) == request


@pytest.mark.parametrize("content", [{}, {"texts": ["x"], "neighbours": {}}])
def test_a_body_of_unknown_fields_is_one_error(content: dict[str, Any]) -> None:
    (content.get("neighbours", content)).update({str(number): 1 for number in range(100_000)})
    with pytest.raises(ValidationError, match="100,000 fields are more than there are") as caught:
        PredictRequest.model_validate(content)
    assert caught.value.error_count() <= 2


@pytest.mark.parametrize(
    ("neighbours", "said"),
    [
        ({"joint": 0}, r"neighbours\.joint\.joint: Input should be greater than or equal to 1"),
        ({"joint": 5, "labels": 2}, r"neighbours\.joint\.labels: Extra inputs are not permitted"),
        ({"labels": -1}, r"neighbours\.apart\.labels: Input should be greater than or equal to 0"),
        ({"instances": 0}, r"neighbours\.apart: Value error, at least one of `instances` and `labels` must be .* zero"),
        ({"x": 1}, r"neighbours\.apart\.x: Extra inputs are not permitted"),
        (5, r"neighbours\.apart: Input should be a valid dictionary or instance of Apart"),
    ],
)
def test_one_mistake_in_the_neighbours_is_one_error(neighbours: object, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PredictRequest.model_validate({"texts": ["x"], "neighbours": neighbours})
    (error,) = caught.value.errors()
    assert re.fullmatch(said, f"{'.'.join(map(str, error['loc']))}: {error['msg']}")


def test_what_is_not_finite_is_refused() -> None:
    for value in (math.nan, math.inf, -math.inf):
        assert not accepts({"texts": ["x"], "temperature": value})
        assert not accepts({"texts": ["x"], "lambda": value})


def test_every_field_and_error_is_described_with_an_example() -> None:
    schema = PredictRequest.model_json_schema()
    for model in (schema, *(schema["$defs"].values())):
        for name, field in model["properties"].items():
            assert field.get("description"), name
            assert field.get("examples") or field.get("type") == "boolean", name


def test_every_parameter_is_described_with_an_example() -> None:
    ingress = SimpleNamespace(answered=lambda *_: None)
    document = make_api(ingress, ServeSettings(memory="m"), Tokens(None)).openapi()  # type: ignore[arg-type]
    parameters = [
        parameter
        for operations in document["paths"].values()
        for operation in operations.values()
        for parameter in operation.get("parameters", [])
    ]
    assert {parameter["name"] for parameter in parameters} == {"prefix", "limit", "uid"}
    for parameter in parameters:
        assert parameter["description"], parameter["name"]
        assert parameter["schema"]["examples"], parameter["name"]


def test_the_client_takes_a_token_as_a_file_has_it_and_shows_no_other() -> None:
    with Client("http://127.0.0.1:9", token="secret\n") as client:
        assert client._http.headers["authorization"] == "Bearer secret"
    for token in ("two secrets", "secret\nof two lines", "s\u00e9cret"):
        with pytest.raises(
            ValueError, match=r"^token: a bearer token has printable ASCII characters only, and no blanks$"
        ):
            Client("http://127.0.0.1:9", token=token)


def test_the_client_sends_what_the_model_takes() -> None:
    body = _body(["x"], 3, 0.5, 0.1, 20, 2, ["a"], None, True)
    assert PredictRequest.model_validate_json(body) == PredictRequest.model_validate(
        {
            "texts": ["x"],
            "k": 3,
            "lambda": 0.5,
            "temperature": 0.1,
            "neighbours": {"joint": 20},
            "evidence": 2,
            "labels_allowed": ["a"],
            "allow_partial": True,
        }
    )
