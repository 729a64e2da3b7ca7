"""Exports that the disk has no room for: the system's error, nothing half-written, and the earlier file as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_slides import tissue_like, write_pyramid

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from featurestore.storage.store import Store
from histosge.prediction.expression_store import ExpressionStore

GRID = GridSpec(mpp=1.0, patch_px=32, stride_px=16)
GENES = ("EPCAM", "CD3E", "COL1A1")
# No file may be longer than this, which the kernel enforces as it does a full disk, but without a mount.
LIMIT_BYTES = 300
EXPORTS = """
import errno, json, resource, sys
from pathlib import Path
from histosge.exporting.export import export
from histosge.exporting.export_format import FORMATS
import anndata, dask.array, h5py, polars, tifffile, zarr

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
names = [name for name in FORMATS.names() if name != "spatialdata"]
outs = {name: folder / f"out-{name}" / f"x{FORMATS.get(name).suffix}" for name in names}
outs["zarr"] = folder / "out-zarr" / "x.zarr"
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for name, out in outs.items():
    source = folder / ("maps" if FORMATS.get("h5ad" if name == "zarr" else name).maps else "store")
    try:
        export(source, out, "h5ad" if name == "zarr" else name)
    except OSError as error:
        print(json.dumps([name, errno.errorcode[error.errno]]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    write_pyramid(folder / "A.tif", tissue_like(700, 500, 0.5), 0.5)
    embed(str(folder / "A.tif"), str(folder / "store"), EmbedSettings(("colour",), GRID))
    stored = Store.open(str(folder / "store")).grid("A", GRID.key)
    made = ExpressionStore.open_or_create(str(folder / "maps")).add_map(
        stored, GENES, (32, 32), {"model": "m"}
    )
    values = np.random.default_rng(0).random((*stored.grid.shape, len(GENES)))
    values[~stored.is_tissue] = np.nan
    for block in made.planned():
        made.array.write(block, values[block.slices])
    return folder


def test_no_export_crashes_or_leaves_half_a_file_where_there_is_no_room(folder: Path) -> None:
    (folder / "out-h5ad").mkdir()
    (folder / "out-h5ad" / "x.h5ad").write_text("the earlier one")
    ran = subprocess.run(
        [sys.executable, "-c", EXPORTS, str(folder), str(LIMIT_BYTES)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr  # HDF5 is asked to close files once more when a process ends
    assert dict(map(json.loads, ran.stdout.splitlines())) == dict.fromkeys(
        ("geojson", "h5ad", "ome-zarr", "parquet", "qupath", "tiff", "trident", "zarr"), "EFBIG"
    )
    left = [str(path.relative_to(folder)) for path in folder.glob("out-*/**/*") if path.is_file()]
    assert left == ["out-h5ad/x.h5ad"]
    assert (folder / "out-h5ad" / "x.h5ad").read_text() == "the earlier one"
