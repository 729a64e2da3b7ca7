"""Other tools' embeddings -> a feature store, if their patches lie on a grid from the slide's corner."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featurestore.embedding.block_task import to_float16
from featurestore.embedding.plan import software_versions
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import MppError, StoreError
from featurestore.exchange.external import ExternalEmbeddings, smallest_step
from featurestore.exchange.h5 import read_h5
from featurestore.exchange.raw2features import read_raw2features
from featurestore.grid import GridSpec, PatchGrid
from featurestore.location import PathOrUrl, strip_credentials
from featurestore.names import slug
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import open_slide
from featurestore.storage.store import SlideRecord, Store
from featurestore.tissue.survey import Survey
from featurestore.tissue.threshold import is_tissue


@dataclass(frozen=True)
class ImportOptions:
    """What the user tells of a file that does not say it; None where there is nothing to tell.

    Parameters
    ----------
    slide
        The slide's file: it says size, scale and fingerprint.
    slide_id, encoder
        Names in the store.
    slide_mpp
        Microns per pixel at level 0.
    mpp, patch_px
        Of the patches, as the encoder saw them.
    grid
        Of a raw2features store with several.
    """

    slide: str | None = None
    slide_id: str | None = None
    encoder: str | None = None
    slide_mpp: float | None = None
    mpp: float | None = None
    patch_px: int | None = None
    grid: str | None = None


def import_embeddings(file: PathOrUrl, store: PathOrUrl, told: ImportOptions) -> tuple[str, str, int]:
    """Write another tool's embeddings into a store.

    The file is read into memory whole.

    Returns
    -------
    (str, str, int)
        Slide id, grid key, and number of patches.

    Raises
    ------
    StoreError
        If the file is of no known format, or its patches lie on no grid from the slide's corner.
    MppError
        If the slide's scale is neither in the file nor told.
    """
    foreign = _read(Path(file), told)
    record = _slide_record(foreign, told)
    grid = _grid(foreign, record, told)
    rows, cols = _positions(foreign, grid)
    key = told.encoder or foreign.encoder
    if not key:
        raise StoreError(f"{file} does not say which encoder made it; name it with --encoder")
    facts = {"imported_from": foreign.format, **foreign.facts}
    identity = EncoderIdentity(key, foreign.features.shape[1], facts)
    target = Store.open_or_create(store)
    target.add_slide(record)
    tissue = np.zeros(grid.shape, np.uint8)
    tissue[rows, cols] = 255
    if not target.grid_attrs(record.slide_id, grid.spec.key).get("grid"):
        rgb = np.full((*grid.shape, 3), 255, np.uint8)
        survey = Survey(tissue, rgb, {"name": "imported", "from": foreign.format})
        target.add_grid(record.slide_id, grid, survey, software_versions())
    stored = target.grid(record.slide_id, grid.spec.key)
    if stored.grid != grid or (stored.is_tissue != is_tissue(tissue)).any():
        raise StoreError(
            f"{record.slide_id}/{grid.spec.key} is stored with other patches; clear it with: "
            f"histosge rm {target.location.label} --slide {record.slide_id} --grid {grid.spec.key}"
        )
    array = target.add_embedding(record.slide_id, grid, identity)
    target.consolidate(record.slide_id)
    index = np.full(grid.shape, -1, np.int64)
    index[rows, cols] = np.arange(len(rows))
    for block in array.missing(stored.planned(array.block_shape)):
        of = index[block.slices]
        values = np.full((*block.shape, identity.dim), np.nan, np.float32)
        values[of >= 0] = foreign.features[of[of >= 0]]
        array.write(block, to_float16(values)[0])
    return record.slide_id, grid.spec.key, len(rows)


def _read(path: Path, told: ImportOptions) -> ExternalEmbeddings:
    if path.is_dir():
        return read_raw2features(path, told.grid, told.encoder)
    if not path.is_file():
        raise StoreError(f"there is no file at {path}")
    return read_h5(path)


def _slide_record(foreign: ExternalEmbeddings, told: ImportOptions) -> SlideRecord:
    slide_id = slug(told.slide_id or foreign.slide_id).lstrip("_") or "slide"
    if told.slide:
        slide = open_slide(told.slide, told.slide_mpp)
        size, mpp = slide.size_px, slide.mpp
        slide.close()
        return SlideRecord(slide_id, strip_credentials(told.slide), size, mpp, slide_fingerprint(told.slide))
    mpp = told.slide_mpp or foreign.mpp or 0.0
    if not mpp:
        raise MppError(
            f"{foreign.format} file of {slide_id!r} does not say the slide's microns per pixel; give --slide-mpp"
        )
    side = foreign.patch_level0_px or smallest_step(foreign.coords_px)
    reach = foreign.coords_px.max(axis=0) + side
    size = foreign.size_px or (int(reach[0]), int(reach[1]))
    # Without the file nobody can tell which slide it is: what lies where is all there is to compare.
    digest = hashlib.sha256(np.ascontiguousarray(foreign.coords_px).tobytes()).hexdigest()
    return SlideRecord(slide_id, "", size, mpp, f"imported-{digest}")


def _grid(foreign: ExternalEmbeddings, record: SlideRecord, told: ImportOptions) -> PatchGrid:
    patch_px = told.patch_px or foreign.patch_px
    level0 = foreign.patch_level0_px
    if level0 is None and told.mpp and patch_px:
        level0 = patch_px * told.mpp / record.mpp
    if patch_px is None or level0 is None:
        raise StoreError(
            f"{foreign.format} file of {record.slide_id!r} does not say its patches' size; give --patch and --mpp"
        )
    step = foreign.step_px or smallest_step(foreign.coords_px) or level0
    effective = record.mpp * level0 / patch_px
    stride = step * patch_px / level0
    if abs(stride - round(stride)) > 0.02 or round(stride) < 1:
        raise StoreError(
            f"patches {step:g} level-0 px apart are {stride:.3f} px apart at the encoder's scale: no whole step"
        )
    spec = GridSpec(round(told.mpp or effective, 4), patch_px, round(stride))
    laid = PatchGrid.for_slide(record.size_px, record.mpp, (effective,), spec)
    reach = np.rint(foreign.coords_px.max(axis=0) / step).astype(int) + 1
    n_cols, n_rows = max(laid.n_cols, int(reach[0])), max(laid.n_rows, int(reach[1]))
    return PatchGrid(spec, record.mpp, laid.effective_mpp, n_rows, n_cols)


def _positions(foreign: ExternalEmbeddings, grid: PatchGrid) -> tuple[np.ndarray, np.ndarray]:
    step = grid.stride_um / grid.slide_mpp
    place = foreign.coords_px / step
    nearest = np.rint(place).astype(np.int64)
    # Corners were rounded to whole pixels.
    off = np.abs(place - nearest).max() * step
    if off > 1:
        start = foreign.coords_px.min(axis=0)
        raise StoreError(
            f"{foreign.format} file of {foreign.slide_id!r}: patches start at {tuple(start.tolist())} level-0 px, "
            f"{off:.0f} px off a grid of {step:g} px from the slide's corner; only such grids can be imported"
        )
    cols, rows = nearest.T
    if len(np.unique(nearest, axis=0)) < len(nearest):
        raise StoreError(f"{foreign.format} file of {foreign.slide_id!r} holds a patch twice")
    return rows, cols
