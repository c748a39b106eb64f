"""Cases that schemathesis makes from OpenAPI, for the server, and from JSON Schema, for the artifacts.

It makes cases that follow the schema, and cases that break it in one place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.promises.requests import BODIES, JSON, Sent
from unetc.artifacts.record import Artifact


def schema_of(example: Any) -> dict[str, Any]:
    """Describe the type of a value that is like an example."""
    match example:
        case dict():
            return {"type": "object", "properties": {name: schema_of(value) for name, value in example.items()}}
        case list():
            return {"type": "array", "items": schema_of(example[0]) if example else {}}
        case bool():
            return {"type": "boolean"}
        case int():
            return {"type": "integer"}
        case float():
            return {"type": "number"}
    return {"type": "string"}


def with_bodies(description: Mapping[str, Any]) -> dict[str, Any]:
    """Add the bodies that the description of the server leaves open."""
    whole: dict[str, Any] = json.loads(json.dumps(description))
    for path, examples in BODIES.items():
        named = path.replace("plain.denoiser", "{model}").replace("plain", "{model}")
        operation = whole["paths"][named]["post"]
        operation.setdefault("requestBody", _body({"anyOf": [*map(schema_of, examples)]}))
    return whole


def _body(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {JSON: {"schema": schema}}}


def requests(description: Mapping[str, Any]) -> list[st.SearchStrategy[Sent]]:
    """Make a strategy for each operation of a server, with cases that follow the schema and cases that do not."""
    return [strategy.map(_sent) for strategy in _strategies(with_bodies(description))]


def artifacts(kinds: Mapping[str, type[Artifact]]) -> list[st.SearchStrategy[tuple[type[Artifact], bytes]]]:
    """Make strategies for the JSON of each kind of artifact."""
    found: list[st.SearchStrategy[tuple[type[Artifact], bytes]]] = []
    for kind in kinds.values():
        (schema,), parts = msgspec.json.schema_components([kind], ref_template="#/components/schemas/{name}")
        described = {
            "openapi": "3.1.0",
            "info": {"title": kind.__name__, "version": "1"},
            "paths": {"/": {"post": {"requestBody": _body(schema), "responses": {"200": {"description": "good"}}}}},
            "components": {"schemas": parts},
        }
        found += [strategy.map(lambda case, kind=kind: (kind, _bytes(case))) for strategy in _strategies(described)]
    return found


def _strategies(description: Mapping[str, Any]) -> Iterator[st.SearchStrategy[Any]]:
    """Make two strategies for each operation that takes something."""
    for found in schemathesis.openapi.from_dict(description).get_all_operations():
        operation = found.ok()
        if {"parameters", "requestBody"} & description["paths"][operation.path][operation.method].keys():
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                yield operation.as_strategy(generation_mode=mode)


def _sent(case: Any) -> Sent:
    """Write a case as a request."""
    return Sent(
        method=case.method.upper(),
        path=case.formatted_path,
        query=dict(case.query or {}),
        body=_bytes(case),
        headers={"Content-Type": case.media_type} if case.media_type else {},
    )


def _bytes(case: Any) -> bytes:
    if isinstance(case.body, bytes):
        return case.body
    return b"" if type(case.body).__name__ == "NotSet" else json.dumps(case.body).encode()
