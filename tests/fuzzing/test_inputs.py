"""Sheets, TIFF headers and feature files made at random: read, or refused in one line; never slow, never large."""

import io
import resource
import struct
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openpyxl
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_slides import painted

from featurestore.errors import FeatureStoreError
from featurestore.exchange.importing import ImportOptions, import_embeddings
from featurestore.slides.open_slide import open_slide
from featurestore.slides.sample_sheet import read_samples

MOST_SECONDS, MOST_BYTES = 10, 1 << 30
# The same folder for all examples of a test: each overwrites its one file.
few = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@contextmanager
def bounded() -> Iterator[None]:
    """Allow nothing but an error of ours, of one line, within bounds of time and memory."""
    # The peak of the process only grows, so its growth is what this example needed beyond all before it.
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except FeatureStoreError as error:
        message = str(error)
        assert message
        assert "\n" not in message
    assert time.process_time() - started < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


CELL = st.one_of(
    st.sampled_from(
        [
            "",
            "a.tif",
            "A",
            "0.5",
            "0,5",
            "inf",
            "1e999",
            "-1",
            "nan",
            "..",
            "x" * 5000,
            " ",
            '"',
            "s3://",
            "\x00",
        ]
    ),
    st.text(max_size=12),
)
COLUMN = st.one_of(
    st.sampled_from(["slide", " slide", "Slide", "slide_id", "mpp", "donor", "expression", "mask", ""]),
    st.text(max_size=6),
)


@few
@given(
    header=st.lists(COLUMN, min_size=1, max_size=6),
    rows=st.lists(st.lists(CELL, max_size=7), max_size=5),
    separator=st.sampled_from([",", ";", "\t", "|"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "utf-32"]),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_tables(
    tmp_path: Path, header: list[str], rows: list[list[str]], separator: str, encoding: str, newline: str
) -> None:
    (tmp_path / "a.tif").touch()
    text = newline.join(separator.join(cells) for cells in [header, *rows])
    (tmp_path / "sheet.csv").write_bytes(text.encode(encoding, errors="replace"))
    with bounded():
        read_samples(tmp_path / "sheet.csv")


@few
@given(data=st.binary(max_size=300))
def test_sheets_of_any_bytes(tmp_path: Path, data: bytes) -> None:
    for name in ("sheet.csv", "sheet.xlsx"):
        (tmp_path / name).write_bytes(data)
        with bounded():
            read_samples(tmp_path / name)


def _excel() -> dict[str, bytes]:
    book, data = openpyxl.Workbook(), io.BytesIO()
    for row in (["slide", "mpp"], ["a.tif", 0.5]):
        book.active.append(row)
    book.save(data)
    with zipfile.ZipFile(data) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


EXCEL = _excel()


@few
@given(
    part=st.sampled_from(sorted(EXCEL)),
    at=st.integers(0, 3000),
    size=st.integers(0, 30),
    new=st.one_of(
        st.binary(max_size=20),
        st.sampled_from([b'r="99999999999"', b"<row>", b"<c r='ZZZZ9'>", b"&a;", b"</"]),
    ),
    drop=st.booleans(),
)
def test_excel_files_with_other_parts(
    tmp_path: Path, part: str, at: int, size: int, new: bytes, drop: bool
) -> None:
    (tmp_path / "a.tif").touch()
    data = EXCEL[part]
    at %= len(data) + 1
    with zipfile.ZipFile(tmp_path / "sheet.xlsx", "w") as archive:
        for name, content in EXCEL.items():
            if name != part:
                archive.writestr(name, content)
            elif not drop:
                archive.writestr(name, data[:at] + new + data[at + size :])
    with bounded():
        read_samples(tmp_path / "sheet.xlsx")


def _tiff(**options: Any) -> bytes:
    data = io.BytesIO()
    image = painted(211, 131)
    with tifffile.TiffWriter(
        data, bigtiff=options.pop("bigtiff", False), ome=options.pop("ome", False)
    ) as file:
        for step in (1, 2):
            file.write(
                image[::step, ::step],
                photometric="rgb",
                resolution=(20000 / step, 20000 / step),
                resolutionunit="CENTIMETER",
                subfiletype=int(step > 1),
                **options,
            )
    return data.getvalue()


TIFFS = {
    "jpeg": _tiff(tile=(64, 64), compression="jpeg"),
    "deflate": _tiff(tile=(64, 64), compression="zlib", bigtiff=True),
    "strips": _tiff(rowsperstrip=16),
    "ome": _tiff(
        tile=(64, 64), ome=True, metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    ),
}
NUMBER = st.sampled_from([0, 1, 2, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])


def _entries(data: bytes) -> list[tuple[int, int]]:
    """Return where each entry of the first directory is, and its size."""
    is_big = data[2] == 43
    (start,) = struct.unpack_from("<Q" if is_big else "<I", data, 8 if is_big else 4)
    (count,) = struct.unpack_from("<Q" if is_big else "<H", data, start)
    head, size = (8, 20) if is_big else (2, 12)
    return [(start + head + i * size, size) for i in range(count)]


def _read(path: Path) -> None:
    with closing(open_slide(path, fallback_mpp=0.5)) as slide:
        slide.read_region(0, 0, 64, 64, slide.mpp)
        slide.read_region(-10, 90, 64, 64, 2 * slide.mpp)


@few
@pytest.mark.parametrize("kind", sorted(TIFFS))
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from(["tag", "type", "count", "value", "number"]), NUMBER),
        min_size=1,
        max_size=3,
    )
)
def test_tags_of_tiffs(tmp_path: Path, kind: str, changes: list[tuple[int, str, int]]) -> None:
    data = bytearray(TIFFS[kind])
    entries = _entries(TIFFS[kind])
    for which, what, number in changes:
        at, size = entries[which % len(entries)]
        word = "<Q" if size == 20 else "<I"
        width = struct.calcsize(word)
        value = number % 256**width
        if what == "tag":
            struct.pack_into("<H", data, at, number % 65536)
        elif what == "type":
            struct.pack_into("<H", data, at + 2, number % 20)
        elif what == "number":  # one number of the widest kind
            struct.pack_into("<H", data, at + 2, 16 if size == 20 else 4)
            struct.pack_into(word, data, at + 4, 1)
            struct.pack_into(word, data, at + 4 + width, value)
        else:
            struct.pack_into(word, data, at + 4 + (width if what == "value" else 0), value)
    path = tmp_path / "slide.tif"
    path.write_bytes(data)
    with bounded():
        _read(path)


@few
@pytest.mark.parametrize("kind", sorted(TIFFS))
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=9)), max_size=4),
    keep=st.floats(0, 1),
)
def test_bytes_of_tiffs(tmp_path: Path, kind: str, changes: list[tuple[float, bytes]], keep: float) -> None:
    data = bytearray(TIFFS[kind])
    for where, new in changes:
        at = int(where * len(data))
        data[at : at + len(new)] = new
    path = tmp_path / "slide.tif"
    path.write_bytes(data[: int(keep * len(data))] if keep < 0.5 else data)
    with bounded():
        _read(path)


VALUE = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9),
    st.binary(min_size=1, max_size=9).map(np.void),
    st.lists(st.floats(), min_size=1, max_size=3),
    st.sampled_from([0, -1, 64, "um", 0.5]),
)
ATTRIBUTES = [
    *("patch_size", "patch_size_level0", "overlap", "level0_width", "level0_height", "name", "downsample"),
    *("level_dim", "patch_level", "unit", "tile_size", "tile_size_um", "tile_size_px", "extractor"),
]


@few
@given(
    attrs=st.dictionaries(st.sampled_from(ATTRIBUTES), VALUE, max_size=6),
    names=st.sampled_from([("features", "coords"), ("feats", "coords")]),
    shape=st.sampled_from([(12, 3), (1, 12, 3), (12,), (0, 3), (12, 0), (3,), (11, 3)]),
    corner=st.one_of(st.floats(), st.integers(-200, 10**6)),
    encoder=st.one_of(st.none(), st.sampled_from(["e", "..", "tissue", "a/b"]), st.text(max_size=5)),
)
def test_feature_files(
    tmp_path_factory: pytest.TempPathFactory,
    attrs: dict[str, Any],
    names: tuple[str, str],
    shape: tuple[int, ...],
    corner: float,
    encoder: str | None,
) -> None:
    folder = tmp_path_factory.mktemp("h5")
    corners = np.argwhere(np.ones((3, 4), bool))[:, ::-1] * 64.0
    corners[5, 0] = corner
    with h5py.File(folder / "A.h5", "w") as file:
        file[names[0]] = np.ones(shape, np.float32)
        file[names[1]] = corners
        for name, value in attrs.items():
            for item in (file, file["coords"]):
                item.attrs[name] = h5py.Empty("f4") if value is None else value
    _imports(folder, encoder)


def _imports(folder: Path, encoder: str | None) -> None:
    for options in (
        ImportOptions(encoder=encoder, slide_mpp=0.5),
        ImportOptions(None, "S", "e", 0.5, 0.5, 64),
    ):
        with bounded():
            import_embeddings(folder / "A.h5", folder / "store", options)
    written = {path.name for path in folder.parent.iterdir()}
    assert not written & {"store", "tissue", "rgb"}  # nothing outside its folder
