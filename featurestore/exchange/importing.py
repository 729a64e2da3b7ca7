"""Other tools' embeddings -> a feature store, if their patches are on a grid that starts at the slide's corner."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featurestore.credentials import strip_credentials
from featurestore.embedding.block_task import to_float16
from featurestore.embedding.plan import software_versions
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import MppError, StoreError
from featurestore.exchange.external import ExternalEmbeddings, smallest_step
from featurestore.exchange.h5 import read_h5
from featurestore.exchange.raw2features import read_raw2features
from featurestore.grid import GridSpec, PatchGrid
from featurestore.location import PathOrUrl, as_url
from featurestore.names import slug
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import open_slide
from featurestore.storage.store import SlideRecord, Store
from featurestore.tissue.survey import Survey
from featurestore.tissue.threshold import is_tissue


@dataclass(frozen=True)
class ImportOptions:
    """What a file does not state and the user has to; None where the file states it.

    Parameters
    ----------
    slide
        The slide's file, from which size, scale and fingerprint are read.
    slide_id, encoder
        Names in the store.
    slide_mpp
        Microns per pixel at level 0.
    mpp, patch_px
        Scale and side of the patches, as the encoder saw them.
    grid
        Which grid of a raw2features store with several.
    """

    slide: PathOrUrl | None = None
    slide_id: str | None = None
    encoder: str | None = None
    slide_mpp: float | None = None
    mpp: float | None = None
    patch_px: int | None = None
    grid: str | None = None


def import_embeddings(file: PathOrUrl, store: PathOrUrl, options: ImportOptions) -> tuple[str, str, int]:
    """Write another tool's embeddings into a store.

    The file is read into memory whole. Blocks that the store holds already are not written again.

    Parameters
    ----------
    file
        A TRIDENT or CLAM ``.h5`` file, or the folder of a raw2features store.
    store
        Folder or URL of the store; made if there is none.
    options
        What the file does not state.

    Returns
    -------
    (str, str, int)
        Slide id, grid key, and number of patches.

    Raises
    ------
    StoreError
        If the file is of no known format, or its patches are not on a grid that starts at the slide's corner.
    MppError
        If the slide's scale is neither in the file nor in `options`.
    """
    external = _read(Path(file), options)
    record = _slide_record(external, options)
    grid = _grid(external, record, options)
    rows, cols = _positions(external, grid)
    key = options.encoder or external.encoder
    if not key:
        raise StoreError(f"{file} does not state which encoder made it; name it with --encoder")
    facts = {"imported_from": external.format, **external.facts}
    identity = EncoderIdentity(key, external.features.shape[1], facts)
    target = Store.open_or_create(store)
    target.add_slide(record)
    # The other tool's patches are what it took for tissue; nothing is known of the others.
    tissue = np.zeros(grid.shape, np.uint8)
    tissue[rows, cols] = 255
    if not target.grid_attrs(record.slide_id, grid.spec.key).get("grid"):
        rgb = np.full((*grid.shape, 3), 255, np.uint8)
        survey = Survey(tissue, rgb, {"name": "imported", "from": external.format})
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
        feature_rows = index[block.slices]
        has_vector = feature_rows >= 0
        values = np.full((*block.shape, identity.dim), np.nan, np.float32)
        values[has_vector] = external.features[feature_rows[has_vector]]
        array.write(block, to_float16(values)[0])
    return record.slide_id, grid.spec.key, len(rows)


def _read(path: Path, options: ImportOptions) -> ExternalEmbeddings:
    if path.is_dir():
        return read_raw2features(path, options.grid, options.encoder)
    if not path.is_file():
        raise StoreError(f"there is no file at {path}")
    return read_h5(path)


def _slide_record(external: ExternalEmbeddings, options: ImportOptions) -> SlideRecord:
    slide_id = slug(options.slide_id or external.slide_id).lstrip("_") or "slide"  # "_..." is reserved
    if options.slide:
        source = as_url(options.slide)
        slide = open_slide(source, options.slide_mpp)
        size, mpp = slide.size_px, slide.mpp
        slide.close()
        return SlideRecord(slide_id, strip_credentials(source), size, mpp, slide_fingerprint(source))
    mpp = options.slide_mpp or external.mpp or 0.0
    if not mpp:
        raise MppError(
            f"{external.format} file of {slide_id!r} does not state the slide's microns per pixel; give --slide-mpp"
        )
    side = external.patch_level0_px or smallest_step(external.coords_px)
    reach = external.coords_px.max(axis=0) + side
    size = external.size_px or (int(reach[0]), int(reach[1]))
    # Without the slide's file there is no fingerprint of it: the positions of the patches identify it as well as can be.
    digest = hashlib.sha256(np.ascontiguousarray(external.coords_px).tobytes()).hexdigest()
    return SlideRecord(slide_id, "", size, mpp, f"imported-{digest}")


def _grid(external: ExternalEmbeddings, record: SlideRecord, options: ImportOptions) -> PatchGrid:
    patch_px = options.patch_px or external.patch_px
    level0 = external.patch_level0_px
    if level0 is None and options.mpp and patch_px:
        level0 = patch_px * options.mpp / record.mpp
    if patch_px is None or level0 is None:
        raise StoreError(
            f"{external.format} file of {record.slide_id!r} does not state the size of its patches; give --patch and --mpp"
        )
    step = external.step_px or smallest_step(external.coords_px) or level0
    effective = record.mpp * level0 / patch_px
    stride = step * patch_px / level0
    if abs(stride - round(stride)) > 0.02 or round(stride) < 1:
        raise StoreError(
            f"patches {step:g} level-0 px apart are {stride:.3f} px apart at the encoder's scale; only whole steps can be "
            "imported"
        )
    # Four decimals, as in a grid's key. The grid may be larger than ours would be: other tools keep patches that reach
    # beyond the slide.
    spec = GridSpec(round(options.mpp or effective, 4), patch_px, round(stride))
    minimal = PatchGrid.for_slide(record.size_px, record.mpp, (effective,), spec)
    reach = np.rint(external.coords_px.max(axis=0) / step).astype(int) + 1
    n_cols, n_rows = max(minimal.n_cols, int(reach[0])), max(minimal.n_rows, int(reach[1]))
    return PatchGrid(spec, record.mpp, minimal.effective_mpp, n_rows, n_cols)


def _positions(external: ExternalEmbeddings, grid: PatchGrid) -> tuple[np.ndarray, np.ndarray]:
    step = grid.stride_um / grid.slide_mpp
    place = external.coords_px / step
    nearest = np.rint(place).astype(np.int64)
    # Up to one pixel, since other tools round corners to whole level-0 pixels.
    off = np.abs(place - nearest).max() * step
    if off > 1:
        start = external.coords_px.min(axis=0)
        raise StoreError(
            f"{external.format} file of {external.slide_id!r}: patches start at {tuple(start.tolist())} level-0 px, "
            f"{off:.0f} px off a grid of {step:g} px from the slide's corner; only patches on such a grid can be imported"
        )
    cols, rows = nearest.T
    if len(np.unique(nearest, axis=0)) < len(nearest):
        raise StoreError(f"{external.format} file of {external.slide_id!r} holds a patch twice")
    return rows, cols
