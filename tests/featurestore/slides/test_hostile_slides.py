"""Slides whose headers claim what cannot be: one line, little memory, and the process lives."""

import struct
import time
import tracemalloc
import zlib
from contextlib import closing
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from make_slides import painted

from featurestore.errors import SlideError
from featurestore.slides.open_slide import open_slide
from featurestore.slides.picture_bounds import frame_header

IMAGE = painted(211, 131)
MPP = (20000, 20000)
HUGE = 2**31 - 1


def _tiff(path: Path, *, compression: str | None = None, bigtiff: bool = False, tile: bool = True) -> Path:
    tifffile.imwrite(
        path,
        IMAGE,
        photometric="rgb",
        compression=compression,
        bigtiff=bigtiff,
        tile=(64, 64) if tile else None,
        resolution=MPP,
        resolutionunit="CENTIMETER",
    )
    return path


def _patch_tag(path: Path, name: str, *, count: int | None = None, value: int | None = None) -> None:
    """Overwrite a tag's count, or make it one number."""
    with tifffile.TiffFile(path) as file:
        tag, big = file.pages.first.tags[name], file.is_bigtiff
    data = bytearray(path.read_bytes())
    if count is not None:
        data[tag.offset + 4 : tag.offset + (12 if big else 8)] = struct.pack("<Q" if big else "<I", count)
    if value is not None:
        form, kind = ("<HQQ", 16) if big else ("<HII", 4)
        entry = struct.pack(form, kind, 1, value)
        data[tag.offset + 2 : tag.offset + 2 + len(entry)] = entry
    path.write_bytes(data)


def _read(path: Path) -> None:
    with closing(open_slide(path, fallback_mpp=0.5)) as slide:
        slide.read_region(0, 0, 64, 64, slide.mpp)


def _refused(path: Path) -> str:
    """Open a slide and read from it; return the one line that refuses it."""
    started = time.process_time()
    tracemalloc.start()
    with pytest.raises(SlideError) as refused:
        _read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 << 20
    assert time.process_time() - started < 10
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("compression", [None, "jpeg", "zlib"])
@pytest.mark.parametrize("value", [0, HUGE, 2**32 - 1])
@pytest.mark.parametrize("name", ["TileWidth", "TileLength", "ImageWidth", "ImageLength"])
def test_sizes_that_cannot_be(tmp_path: Path, name: str, value: int, compression: str | None) -> None:
    path = _tiff(tmp_path / "A.tif", compression=compression)
    _patch_tag(path, name, value=value)
    _refused(path)


@pytest.mark.parametrize("value", [0, HUGE])
def test_strips_that_cannot_be(tmp_path: Path, value: int) -> None:
    for name in ("RowsPerStrip", "ImageWidth"):
        path = _tiff(tmp_path / f"{name}.tif", tile=False, compression="zlib")
        _patch_tag(path, name, value=value)
        if (name, value) != ("RowsPerStrip", HUGE):  # one strip that is longer than the page is right
            _refused(path)


@pytest.mark.parametrize("count", [0, 2**31, 2**40, 2**63])
@pytest.mark.parametrize("name", ["TileOffsets", "TileByteCounts"])
def test_lists_of_tiles_that_cannot_be(tmp_path: Path, name: str, count: int) -> None:
    path = _tiff(tmp_path / "A.tif", bigtiff=True, compression="zlib")
    _patch_tag(path, name, count=count)
    _refused(path)


def test_tiles_beyond_the_file(tmp_path: Path) -> None:
    for name in ("TileOffsets", "TileByteCounts"):
        path = _tiff(tmp_path / f"{name}.tif", bigtiff=True, compression="zlib")
        with tifffile.TiffFile(path) as file:
            tag = file.pages.first.tags[name]
        data = bytearray(path.read_bytes())
        data[tag.valueoffset : tag.valueoffset + 8] = (
            b"\xff" * 8 if tag.dtype == 16 else b"\xff" * 4 + data[tag.valueoffset + 4 : tag.valueoffset + 8]
        )
        path.write_bytes(data)
        _refused(path)


def test_a_resolution_without_a_denominator_is_no_scale(tmp_path: Path) -> None:
    for numerator, denominator in ((1, 0), (0, 0), (0, 1)):
        path = _tiff(tmp_path / "A.tif", tile=False)
        with tifffile.TiffFile(path) as file:
            tags = [file.pages.first.tags[name] for name in ("XResolution", "YResolution")]
        data = bytearray(path.read_bytes())
        for tag in tags:
            data[tag.valueoffset : tag.valueoffset + 8] = struct.pack("<II", numerator, denominator)
        path.write_bytes(data)
        with pytest.raises(SlideError, match="--slide-mpp"):
            open_slide(path)
        assert open_slide(path, fallback_mpp=0.5).mpp == 0.5


def _ome(path: Path, xml: str) -> Path:
    tifffile.imwrite(
        path, IMAGE, photometric="rgb", description="PLACEHOLDER" + " " * len(xml), metadata=None
    )
    data = path.read_bytes()
    at = data.index(b"PLACEHOLDER")
    path.write_bytes(data[:at] + xml.encode().ljust(len(xml) + 11, b"\0") + data[at + len(xml) + 11 :])
    return path


OME = (
    '<?xml version="1.0"?>{dtd}<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0" '
    'Name="{name}"><Pixels DimensionOrder="XYCZT" ID="Pixels:0" SizeC="{c}" SizeT="{t}" SizeX="211" SizeY="131" SizeZ="1" '
    'Type="uint8" PhysicalSizeX="0.5" PhysicalSizeY="0.5"><Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData/>'
    "</Pixels></Image>{more}</OME>"
)


def test_ome_xml_as_it_should_be_is_read(tmp_path: Path) -> None:
    slide = open_slide(_ome(tmp_path / "A.tif", OME.format(dtd="", name="A", c=3, t=1, more="")))
    assert (slide.mpp, slide.size_px) == (0.5, (211, 131))


def test_entities_of_ome_xml_are_not_expanded(tmp_path: Path) -> None:
    entities = (
        '<!ENTITY a "'
        + "x" * 1000
        + '">'
        + "".join(f'<!ENTITY {chr(98 + i)} "' + f"&{chr(97 + i)};" * 10 + '">' for i in range(8))
    )
    secret = tmp_path / "secret"
    secret.write_text("SECRET")
    for dtd in (f"<!DOCTYPE OME [{entities}]>", f'<!DOCTYPE OME [<!ENTITY i SYSTEM "file://{secret}">]>'):
        message = _refused(_ome(tmp_path / "A.tif", OME.format(dtd=dtd, name="&i;", c=3, t=1, more="")))
        assert "defines entities" in message
        assert "SECRET" not in message


def test_ome_xml_that_claims_what_cannot_be(tmp_path: Path) -> None:
    modulo = (
        '<StructuredAnnotations><XMLAnnotation ID="Annotation:0" Namespace="openmicroscopy.org/omero/dimension/modulo">'
        '<Value><Modulo><ModuloAlongT Type="lifetime" Start="0" End="1e13" Step="1"/></Modulo></Value></XMLAnnotation>'
        "</StructuredAnnotations>"
    )
    right = {"dtd": "", "name": "A", "c": 3, "t": 1, "more": ""}
    for wrong, said in (
        ({"t": 10**9}, "planes"),
        ({"c": "3e9"}, "planes"),
        ({"c": "9" * 5000}, "planes"),
        ({"more": modulo}, "modulo"),
        ({"more": "<Image>"}, "cannot be parsed"),
        ({"name": "H&E "}, "cannot be parsed"),
    ):
        assert said in _refused(_ome(tmp_path / "A.tif", OME.format(**{**right, **wrong})))


def test_a_jpeg_or_png_of_12_gb_in_a_few_bytes(tmp_path: Path) -> None:
    frame = (
        b"\xff\xc0\x00\x11\x08"
        + struct.pack(">HH", 65500, 65500)
        + b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"
    )
    (tmp_path / "A.jpg").write_bytes(b"\xff\xd8" + frame + b"\xff\xda" + bytes(50))
    header = b"IHDR" + struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "A.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + bytes(50))
    for name in ("A.jpg", "A.png"):
        assert "is said to hold" in _refused(tmp_path / name)


def test_a_tile_whose_stream_is_larger_than_the_tile(tmp_path: Path) -> None:
    for compression in ("jpeg", "jpeg2000"):
        path = _tiff(tmp_path / f"{compression}.tif", compression=compression)
        data = bytearray(path.read_bytes())
        for marker, field in ((b"\xff\xc0\x00\x11\x08", 5), (b"\xff\x4f\xff\x51", 8)):
            at = data.find(marker)
            while at >= 0:
                size = struct.pack(">HH", 65500, 65500) if field == 5 else struct.pack(">II", 10**5, 10**5)
                data[at + field : at + field + len(size)] = size
                at = data.find(marker, at + 1)
        path.write_bytes(data)
        _refused(path)


def test_directories_in_a_circle_end(tmp_path: Path) -> None:
    path = _tiff(tmp_path / "A.tif")
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack("<I", data[4:8])
    (entries,) = struct.unpack("<H", data[start : start + 2])
    data[start + 2 + 12 * entries : start + 6 + 12 * entries] = struct.pack("<I", start)
    path.write_bytes(data)
    assert "circle" in _refused(path)


def test_a_palette_of_another_shape_is_refused(tmp_path: Path) -> None:
    palette = np.random.default_rng(0).integers(0, 65535, (3, 256)).astype(np.uint16)
    path = tmp_path / "A.tif"
    tifffile.imwrite(path, IMAGE[..., 0], photometric="palette", colormap=palette)
    _patch_tag(path, "ColorMap", count=1)
    assert "palette" in _refused(path)


def test_a_slide_larger_than_glass_is_refused(tmp_path: Path) -> None:
    root = zarr.create_group(tmp_path / "A.zarr")
    root.create_array("0", shape=(3, 2**40, 2**40), chunks=(3, 512, 512), dtype="u1")
    axes = [{"name": name, "unit": "micrometer"} for name in "cyx"]
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 0.5, 0.5]}]}]
    root.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    assert "more than any glass slide" in _refused(tmp_path / "A.zarr")


def test_a_jpeg_tile_that_claims_gigabytes_is_not_waited_for(tmp_path: Path) -> None:
    path = _tiff(tmp_path / "A.tif", compression="jpeg")
    with tifffile.TiffFile(path) as file:
        tag = file.pages.first.tags["TileByteCounts"]
    data = bytearray(path.read_bytes())
    size = tag.valuebytecount // tag.count
    data[tag.valueoffset : tag.valueoffset + size] = b"\xff" * size
    path.write_bytes(data)
    assert "the file ends within it" in _refused(path)


def test_headers_of_streams_are_read() -> None:
    for encode in (imagecodecs.jpeg8_encode, imagecodecs.png_encode):
        assert (frame_header(encode(IMAGE)) or ())[:2] == (211, 131)
    for codec in ("j2k", "jp2"):
        stream = imagecodecs.jpeg2k_encode(IMAGE, codecformat=codec)
        assert (frame_header(stream) or ())[:2] == (211, 131)
    assert frame_header(b"\xff\xd8\xff") is None
    assert frame_header(b"") is None
