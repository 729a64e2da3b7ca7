"""Documents from elsewhere are parsed once, and refused in one line that names the field and its value."""

from typing import Annotated, Literal

import msgspec
import pytest

from featurestore.documents import MAX_DOCUMENT_BYTES, DocumentError, convert, parse_json


class Inner(msgspec.Struct):
    width: Annotated[int, msgspec.Meta(ge=1, le=97)]


class Outer(msgspec.Struct):
    mpp: Annotated[float, msgspec.Meta(gt=0, le=20)]
    shape: tuple[int, int]
    inner: Inner | None = None
    names: list[str] = []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"mpp": 1, "mpp": 2}', r'names "mpp" twice'),
        (b'{"a": {"b": 1, "b": 1}}', r'names "b" twice'),
        (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", "nested too deeply"),
        (rb'{"a": "\ud800"}', "half of a surrogate pair"),
        ('{"a": 1}'.encode("utf-16"), "damaged: "),
        (b"{", "damaged: Expecting"),
        (b"\xff\xfe{", "damaged: "),
        (b"1" * 5000, "damaged: Exceeds the limit"),
        (b"", "damaged: Expecting value"),
        (b" " * (MAX_DOCUMENT_BYTES + 1), "more than the"),
    ],
)
def test_what_is_no_json_is_refused_in_one_line(text: bytes, message: str) -> None:
    with pytest.raises(DocumentError, match=rf"^a/b\.json[^\n]*{message}[^\n]*$"):
        parse_json(text, "a/b.json")


def test_a_whole_surrogate_pair_and_nesting_of_a_hundred_are_read() -> None:
    assert parse_json(rb'{"a": "\ud83d\ude00"}', "x") == {"a": "\U0001f600"}
    parse_json(b"[" * 100 + b"]" * 100, "x")


def test_nan_is_read_since_zarr_writes_it() -> None:
    assert parse_json(b'{"a": [NaN, 7]}', "x")["a"][1] == 7


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"shape": [1, 2]}, "missing required field mpp"),
        ({"mpp": 0, "shape": [1, 2]}, "mpp is 0: expected float > 0.0"),
        ({"mpp": float("nan"), "shape": [1, 2]}, "mpp is NaN: expected float"),
        ({"mpp": float("inf"), "shape": [1, 2]}, "mpp is Infinity: expected float <= 20"),
        ({"mpp": None, "shape": [1, 2]}, "mpp is null: expected float, got null"),
        ({"mpp": True, "shape": [1, 2]}, "mpp is true: expected float, got bool"),
        ({"mpp": 1, "shape": [1, "a" * 999]}, rf'shape\[1\] is "{"a" * 59}\.\.\.: expected int, got str'),
        ({"mpp": 1, "shape": [1]}, "shape is a list of 1: expected array of length 2, got 1"),
        ({"mpp": 1, "shape": [1, 2], "inner": {"width": -5}}, r"inner\.width is -5: expected int >= 1"),
        ({"mpp": 1, "shape": [1, 2], "names": ["a", 3]}, r"names\[1\] is 3: expected str, got int"),
        ([], "the document is a list of 0: expected object, got array"),
    ],
)
def test_a_value_out_of_its_schema_is_named_with_its_field(value: object, message: str) -> None:
    with pytest.raises(DocumentError, match=rf"^x\.json is damaged: [^\n]*{message}[^\n]*$"):
        convert(value, Outer, "x.json")


def test_the_part_of_a_document_that_is_checked_is_named() -> None:
    with pytest.raises(DocumentError, match=r"attributes\.grid\.shape\[0\] is null"):
        convert({"mpp": 1, "shape": [None, 1]}, Outer, "x.json", at="attributes.grid")


def test_fields_that_a_later_version_added_are_no_error() -> None:
    assert convert({"mpp": 1, "shape": [2, 3], "later": 5}, Outer, "x") == Outer(1.0, (2, 3))


def test_a_message_repeats_no_value_of_any_length() -> None:
    class Named(msgspec.Struct):
        kind: Literal["regular"]

    with pytest.raises(DocumentError, match=r"^x is damaged: kind is .*invalid enum value") as refused:
        convert({"kind": "long - at `$.other` " * 10_000}, Named, "x")
    assert len(str(refused.value)) < 1000
