"""Which Zarr arrays may be opened: checked on their metadata, before any library acts on it.

An array of objects is decoded by whatever filter its metadata name, and ``pickle`` runs code. Libraries come to refuse
that at different releases, so it is refused here: dtypes and codecs are taken from an allow-list, in formats 2 and 3, in
each node's own document and in consolidated metadata. Nothing is opened here.
"""

import math
import re
from typing import Annotated, Any, Literal

import msgspec

from featurestore.documents import DocumentError, convert, parse_json

DOCUMENTS = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
"""Last segments of the keys under which Zarr keeps metadata, formats 2 and 3."""

MAX_CHUNK_BYTES = 2**31
"""Decoded bytes of one chunk: Blosc and the numcodecs buffers can hold no more."""
MAX_ITEM_BYTES = 2**16
"""Of one element: texts of a fixed length have as many bytes as they please."""
MAX_NESTING = 8
"""Of shards in shards, structures in structures, and groups in consolidated metadata that hold such themselves."""

# Numbers and text. Not in the lists: pickle (runs code), msgpack2, json2, vlen-array and categorize, which decode to
# arrays of arbitrary Python objects, and astype, whose configuration names another dtype.
_SIMPLE = {"bool", "string", "variable_length_utf8", "variable_length_bytes", "bytes"} | {
    f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}
_SIMPLE |= {"float16", "float32", "float64", "complex64", "complex128"}
_FIXED = {"fixed_length_utf32", "null_terminated_bytes", "raw_bytes"}
_TIMES = {"numpy.datetime64", "numpy.timedelta64"}
_STRUCTURED = {"structured", "struct"}
_TEXT_CODECS = {"vlen-utf8", "vlen-bytes"}
# Names of numcodecs, which format 3 gives a prefix.
_NUMCODECS = {
    "adler32",
    "bitround",
    "blosc",
    "bz2",
    "crc32",
    "crc32c",
    "delta",
    "fixedscaleoffset",
    "fletcher32",
    "gzip",
    "jenkins_lookup3",
    "lz4",
    "lzma",
    "packbits",
    "pcodec",
    "quantize",
    "shuffle",
    "zfpy",
    "zlib",
    "zstd",
}
_CODECS_3 = {"bytes", "endian", "transpose", "blosc", "crc32c", "gzip", "zstd", *_TEXT_CODECS}
_CODECS_3 |= {f"numcodecs.{name}" for name in _NUMCODECS}

# Bytes of a number, and length of a text or of raw bytes. Times have a unit, which numpy reads.
_DTYPE_2 = re.compile(r"[|<>=]?(?:[biufc](\d{1,2})|[SUV](\d{1,9})|[mM]8(?:\[\d{0,9}[A-Za-zμ]{0,2}\])?)")

Length = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Extent = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Shape = Annotated[list[Length], msgspec.Meta(max_length=32)]
ChunkShape = Annotated[list[Extent], msgspec.Meta(max_length=32)]
Attributes = dict[str, Any] | None


class Named(msgspec.Struct, frozen=True):
    """An extension point of format 3: a name and its configuration."""

    name: str
    configuration: dict[str, Any] | None = None


class ChunkConfiguration(msgspec.Struct, frozen=True):
    """Of a regular grid of chunks."""

    chunk_shape: ChunkShape


class ChunkGrid(msgspec.Struct, frozen=True):
    """How an array is cut into chunks."""

    configuration: ChunkConfiguration
    name: Literal["regular"] = "regular"


_LARGEST = {"float16": 65504.0, "float32": 3.4028235e38}
"""Finite value of a type of floating point; Python's own numbers are float64."""


class ArrayDocument(msgspec.Struct, frozen=True):
    """``zarr.json`` of an array, format 3."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: Shape
    data_type: str | Named
    chunk_grid: ChunkGrid
    chunk_key_encoding: str | Named
    codecs: Annotated[list[str | Named], msgspec.Meta(min_length=1, max_length=32)]
    fill_value: Any
    attributes: Attributes = None
    dimension_names: list[str | None] | None = None
    storage_transformers: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None


class ConsolidatedMetadata(msgspec.Struct, frozen=True):
    """Documents of the nodes below a group, by their path."""

    metadata: dict[str, dict[str, Any]]


class GroupDocument(msgspec.Struct, frozen=True):
    """``zarr.json`` of a group, format 3."""

    zarr_format: Literal[3]
    node_type: Literal["group"]
    attributes: Attributes = None
    consolidated_metadata: ConsolidatedMetadata | None = None


class Array2Document(msgspec.Struct, frozen=True):
    """``.zarray``: an array of format 2."""

    zarr_format: Literal[2]
    shape: Shape
    chunks: ChunkShape
    dtype: str | list[Any]
    order: Literal["C", "F"] = "C"
    compressor: dict[str, Any] | None = None
    filters: list[dict[str, Any]] | None = None
    dimension_separator: Literal[".", "/"] = "."


class Consolidated2Document(msgspec.Struct, frozen=True):
    """``.zmetadata``: documents of format 2 by their key."""

    metadata: dict[str, dict[str, Any]]


def is_document(key: str) -> bool:
    """Tell whether a key of a Zarr store holds metadata."""
    return key.rpartition("/")[2] in DOCUMENTS


def check_document(key: str, data: bytes, label: str) -> dict[str, Any]:
    """Check a metadata document as it is stored, and return it parsed.

    Parameters
    ----------
    key
        In the Zarr store; its last segment says which kind of document it is.
    label
        The document, for messages.

    Raises
    ------
    DocumentError
        If it is damaged, or describes an array that may not be opened.
    """
    document = parse_json(data, label)
    if not isinstance(document, dict):
        raise DocumentError(f"{label} is damaged: the document is no object")
    match key.rpartition("/")[2]:
        case "zarr.json":
            check_node(document, label)
        case ".zarray":
            check_array_2(document, label)
        case ".zmetadata":
            for name, node in convert(document, Consolidated2Document, label).metadata.items():
                _check_path(name, label)
                if name.rpartition("/")[2] == ".zarray":
                    check_array_2(node, f"{label}, {name}")
    return document


def check_node(document: dict[str, Any], label: str, depth: int = 0) -> ArrayDocument | GroupDocument:
    """Check an array or group of format 3, with the metadata that are consolidated in it; return it typed."""
    if document.get("node_type") == "array":
        array = convert(document, ArrayDocument, label)
        check_array_3(array, label)
        return array
    group = convert(document, GroupDocument, label)
    if depth > MAX_NESTING:
        raise DocumentError(
            f"{label} is damaged: metadata are consolidated in metadata more than {MAX_NESTING} deep"
        )
    for path, node in (group.consolidated_metadata.metadata if group.consolidated_metadata else {}).items():
        _check_path(path, label)
        check_node(node, f"{label}, {path}", depth + 1)
    return group


def check_array_3(array: ArrayDocument, label: str) -> None:
    """Refuse an array of format 3 whose dtype or codecs are not in the allow-list, or whose chunks are too large."""
    item = _item_bytes_3(array.data_type, label)
    _check_chunks(array.shape, array.chunk_grid.configuration.chunk_shape, item, label)
    if array.dimension_names is not None and len(array.dimension_names) != len(array.shape):
        raise DocumentError(
            f"{label} is damaged: dimension_names has {len(array.dimension_names)} names for {len(array.shape)} dimensions"
        )
    most = _LARGEST.get(str(array.data_type))
    fill = array.fill_value
    if most is not None and isinstance(fill, (int, float)) and math.isfinite(fill) and abs(fill) > most:
        # zarr would warn of an overflow, and fill with infinity.
        raise DocumentError(f"{label} is damaged: fill_value {fill:.5g} is no {array.data_type}")
    _check_codecs_3(array.codecs, label)


def check_array_2(document: dict[str, Any], label: str) -> None:
    """Refuse an array of format 2 whose dtype or codecs are not in the allow-list, or whose chunks are too large."""
    array = convert(document, Array2Document, label)
    filters = [str(one.get("id")) for one in array.filters or ()]
    if array.dtype == "|O":
        # Objects are what the filter makes of the bytes: only of text, and only of text from first to last.
        if len(filters) != 1 or filters[0] not in _TEXT_CODECS:
            raise DocumentError(
                f"{label}: an array of Python objects with filters {filters} is not opened, since decoding it may run "
                "code; only text (vlen-utf8) is"
            )
        item = 8
    else:
        item = _item_bytes_2(array.dtype, label)
        for name in filters:
            _check_name(name, _NUMCODECS, label)
    _check_chunks(array.shape, array.chunks, item, label)
    if array.compressor is not None:
        _check_name(str(array.compressor.get("id")), _NUMCODECS, label)
    for codec in [*(array.filters or ()), *([array.compressor] if array.compressor else [])]:
        _check_codec_dtypes(codec, label)


def _check_path(path: str, label: str) -> None:
    """Refuse a path in consolidated metadata that leads out of the group."""
    if ".." in path.split("/") or path.startswith("/") or "\0" in path:
        raise DocumentError(f"{label} is damaged: it names a node {path[:60]!r} outside of itself")


def _check_chunks(shape: list[int], chunks: list[int], item: int, label: str) -> None:
    if len(chunks) != len(shape):
        raise DocumentError(
            f"{label} is damaged: chunks have {len(chunks)} dimensions, the array has {len(shape)}"
        )
    size = math.prod(chunks) * item
    if size > MAX_CHUNK_BYTES:
        raise DocumentError(
            f"{label}: a chunk of {chunks} has {size} bytes, more than the {MAX_CHUNK_BYTES} that are read at once; write "
            "the array with smaller chunks"
        )


def _check_name(name: str, allowed: set[str], label: str) -> None:
    if name not in allowed:
        raise DocumentError(
            f"{label}: codec {name[:60]!r} is not opened, since it is none of those that decode to numbers or text alone"
        )


def _check_codecs_3(codecs: list[str | Named], label: str, depth: int = 0) -> None:
    if depth > MAX_NESTING:
        raise DocumentError(f"{label} is damaged: shards lie in shards more than {MAX_NESTING} deep")
    for codec in codecs:
        name, configuration = (
            (codec, {}) if isinstance(codec, str) else (codec.name, codec.configuration or {})
        )
        if name != "sharding_indexed":
            _check_name(name, _CODECS_3, label)
            _check_codec_dtypes(configuration, label)
            continue
        shards = convert(configuration, _Shards, label, at="codecs.configuration")
        for inner in (shards.codecs, shards.index_codecs):
            _check_codecs_3(inner, label, depth + 1)


class _Shards(msgspec.Struct, frozen=True):
    """Configuration of the codec ``sharding_indexed``."""

    chunk_shape: ChunkShape
    codecs: list[str | Named]
    index_codecs: list[str | Named] = []


def _check_codec_dtypes(configuration: dict[str, Any], label: str) -> None:
    """Refuse a codec that decodes to objects: some name the dtype of what they return."""
    for key in ("dtype", "astype"):
        if configuration.get(key) is not None:
            _item_bytes_2(configuration[key], label)


def _item_bytes_3(data_type: str | Named | Any, label: str, depth: int = 0) -> int:
    """Return the bytes of one element of format 3."""
    name = data_type if isinstance(data_type, str) else data_type.name
    if name in _SIMPLE:
        return int(re.sub(r"\D", "", name) or 64) // 8 if name != "bool" else 1
    if isinstance(data_type, Named):
        about = data_type.configuration or {}
        if name in _TIMES:
            return 8
        if name in _FIXED:
            return _checked_length(about.get("length_bytes"), name, label)
        if name in _STRUCTURED and depth < MAX_NESTING:
            fields = convert(about, _Fields, label, at="data_type.configuration").fields
            types = (field.data_type if isinstance(field, _Field) else field[1] for field in fields)
            return sum(_item_bytes_3(data_type, label, depth + 1) for data_type in types)
    elif (
        match := re.fullmatch(r"r(\d{1,9})", name)
    ) is not None:  # raw bits, as the format's specification has them
        return _checked_length(int(match[1]) // 8, name, label)
    raise DocumentError(f"{label}: dtype {name[:60]!r} is not opened, only numbers and text are")


class _Field(msgspec.Struct, frozen=True):
    """A field of the dtype ``structured`` as newer releases of zarr-python write it; older ones write a pair."""

    name: str
    data_type: str | Named


class _Fields(msgspec.Struct, frozen=True):
    """Configuration of the dtype ``structured``: names and dtypes."""

    fields: Annotated[list[tuple[str, str | Named] | _Field], msgspec.Meta(max_length=1000)]


def _item_bytes_2(dtype: Any, label: str, depth: int = 0) -> int:
    """Return the bytes of one element of format 2, which writes dtypes as numpy does."""
    if _is_structure(dtype) and depth < MAX_NESTING:
        return sum(_item_bytes_2(field, label, depth + 1) for _, field in dtype)
    match = _DTYPE_2.fullmatch(dtype) if isinstance(dtype, str) else None
    if match is None:
        shown = dtype[:60] if isinstance(dtype, str) else type(dtype).__name__
        raise DocumentError(f"{label}: dtype {shown!r} is not opened, only numbers and text are")
    length = int(match[1] or match[2] or 8)
    # A letter of numpy's text takes four bytes.
    return _checked_length(length * (4 if "U" in dtype[:2] else 1), dtype, label)


def _is_structure(dtype: Any) -> bool:
    """Tell whether a dtype is a list of names and dtypes; with shapes as a third part no tool of the field writes any."""
    return (
        isinstance(dtype, list)
        and 0 < len(dtype) <= 1000
        and all(isinstance(field, list) and len(field) == 2 and isinstance(field[0], str) for field in dtype)
    )


def _checked_length(length: Any, dtype: str, label: str) -> int:
    if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length <= MAX_ITEM_BYTES:
        raise DocumentError(
            f"{label}: dtype {dtype[:60]!r} has elements of {str(length)[:60]} bytes; they may have {MAX_ITEM_BYTES} at most"
        )
    return length
