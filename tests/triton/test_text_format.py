from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.triton.schema import SCHEMA, parse
from unetc.triton.placement import Kind
from unetc.triton.text_format import to_text


def test_every_kind_of_field_is_read_back() -> None:
    config = parse(
        to_text(
            {
                "name": "a",
                "max_batch_size": 3,
                "input": [{"name": "x", "dims": (1, -1), "optional": True}, {"name": "y", "dims": (1,), "reshape": {}}],
                "instance_group": ({"kind": Kind.CPU, "count": 2},),
                "parameters": ({"key": "k", "value": {"string_value": "v"}},),
                "output": [],
                "dynamic_batching": {},
            }
        )
    )
    assert (config.name, config.max_batch_size, len(config.output)) == ("a", 3, 0)
    assert [[*one.dims] for one in config.input] == [[1, -1], [1]]
    assert [one.HasField("reshape") for one in config.input] == [False, True]
    assert config.input[0].optional
    assert config.instance_group[0].kind == SCHEMA.ModelInstanceGroup.KIND_CPU
    assert config.parameters["k"].string_value == "v"
    assert config.HasField("dynamic_batching")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_read_back(text: str) -> None:
    assert parse(to_text({"name": text})).name == text


def test_the_schema_refuses_fields_that_it_does_not_have() -> None:
    with pytest.raises(Exception, match="has no field"):
        parse(to_text({"nome": "a"}))
