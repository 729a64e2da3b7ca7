"""Other tools' embeddings -> a feature store: on their grid, or each patch at its own position where they are on none.

An imported embedding's identity is its encoder's: the tool, the encoder's name and what the file states of it. Two slides
by one encoder are trained on together. What the file states of itself and of the slide is kept beside it, under the
attribute ``imported``.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featurestore.credentials import strip_credentials
from featurestore.embedding.plan import software_versions
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import MppError, StoreError
from featurestore.exchange.external import ExternalEmbeddings
from featurestore.exchange.h5 import read_h5
from featurestore.exchange.lattice import Lattice, find_lattice, find_step
from featurestore.exchange.raw2features import read_raw2features
from featurestore.grid import LEVEL_TOLERANCE, GridSpec, OffsetGridSpec, PatchGrid
from featurestore.location import PathOrUrl, as_url
from featurestore.object_stores.hub_place import check_writable
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import open_slide
from featurestore.slides.protocol import MPP_RANGE
from featurestore.slides.sample_sheet import name_slide
from featurestore.storage.float16 import to_float16
from featurestore.storage.layout import check_encoder_key, embedding_path
from featurestore.storage.spots import PatchSpots, add_spots
from featurestore.storage.store import SlideRecord, Store
from featurestore.storage.zarr_metadata import read_attrs
from featurestore.tissue.survey import Survey
from featurestore.tissue.threshold import is_tissue

FLOAT16_MAX = float(np.finfo(np.float16).max)
MAX_CELLS = 50_000_000
"""Positions of a grid: its tissue and colours take 200 MB. A slide of 200,000 x 200,000 px in steps of 56 has 13 million."""
ROWS = 16384
"""Vectors that are converted at once: 200 MB of float64 at 1,536 numbers each."""
WHOLE_STRIDE = 0.02
"""How far a stride may be from a whole number of pixels: floating point, and overlaps that TRIDENT rounds."""


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
    scale
        Vectors are multiplied by it, and it becomes part of the encoder's identity: for values beyond float16.
    """

    slide: PathOrUrl | None = None
    slide_id: str | None = None
    encoder: str | None = None
    slide_mpp: float | None = None
    mpp: float | None = None
    patch_px: int | None = None
    grid: str | None = None
    scale: float | None = None

    def check(self) -> None:
        """Refuse values that cannot be meant.

        Raises
        ------
        StoreError, MppError
            With the option's name.
        """
        for name, mpp in (("--slide-mpp", self.slide_mpp), ("--mpp", self.mpp)):
            if mpp is not None and not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
                raise MppError(f"{name} {mpp:g} is outside {MPP_RANGE[0]}..{MPP_RANGE[1]} microns per pixel")
        if self.patch_px is not None and not 0 < self.patch_px < 2**31:
            raise StoreError(f"--patch {self.patch_px} is no side of a patch in pixels")
        if self.scale is not None and not (0 < self.scale < math.inf):
            raise StoreError(f"--scale {self.scale:g} is no positive number")


@dataclass(frozen=True)
class ImportResult:
    """What was imported.

    Parameters
    ----------
    slide_id, grid_key
        Where it is in the store.
    patches
        Patches with a vector.
    not_finite
        Patches whose vector is not finite in the file: stored as could not be read.
    off_grid
        Patches of TRIDENT's first row and column that are not on its grid, and were left out.
    """

    slide_id: str
    grid_key: str
    patches: int
    not_finite: int
    off_grid: int


def import_embeddings(file: PathOrUrl, store: PathOrUrl, options: ImportOptions) -> ImportResult:
    """Write another tool's embeddings into a store.

    The file is read into memory whole. Blocks that the store holds already are not written again.

    Parameters
    ----------
    file
        A TRIDENT, CLAM or STAMP ``.h5`` file, or the folder of a raw2features store.
    store
        Folder or URL of the store; made if there is none.
    options
        What the file does not state.

    Raises
    ------
    StoreError
        If the file is of no known format, is of another slide, or holds values beyond float16.
    MppError
        If the slide's scale is neither in the file nor in `options`, or absurd.
    """
    options.check()
    check_writable(store)
    external = _read(Path(file), options)
    key = options.encoder or external.encoder
    if not key:
        raise StoreError(f"{file} does not state which encoder made it; name it with --encoder")
    check_encoder_key(key)
    vectors, not_finite = _vectors(external, options.scale)
    mpp, record = _slide_record(external, options)
    external = external.in_level0_px(mpp)
    _check_inside(external, record, options)
    if len(np.unique(external.corners, axis=0)) < len(vectors):
        raise StoreError(f"{external.label} holds a patch twice")
    scale = _scale(external, record, options)
    placed = _grid(external, record, options, scale)
    facts = {"imported_from": external.format, "encoder": key, **external.encoder_facts}
    facts |= {} if options.scale is None else {"scale": options.scale}
    identity = EncoderIdentity(key, vectors.shape[1], facts)
    if placed is None:
        spots = _spots(external, record, options, scale)
        target = _open_target(store)
        target.add_slide(record)
        about = {"imported": external.provenance}
        add_spots(target, record.slide_id, spots, identity, vectors, about, software_versions())
        bad = int(not_finite.sum())
        return ImportResult(record.slide_id, spots.key, len(vectors) - bad, bad, 0)
    grid, lattice = placed
    rows, cols = lattice.rows[lattice.is_on], lattice.cols[lattice.is_on]
    if len(np.unique(rows * grid.n_cols + cols)) < len(rows):
        raise StoreError(f"{external.label} holds a patch twice")
    target = _open_target(store)
    _write(target, record, grid, (rows, cols), vectors[lattice.is_on], identity, external)
    bad = int(not_finite[lattice.is_on].sum())
    return ImportResult(record.slide_id, grid.spec.key, len(rows) - bad, bad, int((~lattice.is_on).sum()))


def _open_target(store: PathOrUrl) -> Store:
    target = Store.open_or_create(store)
    if target.is_private:
        # What other tools write beside vectors is kept, and it may name the slide.
        raise StoreError(
            f"{target.location.label} was made with --private, and the files of other tools may name their slides; import "
            "into another store"
        )
    return target


def _write(
    target: Store,
    record: SlideRecord,
    grid: PatchGrid,
    positions: tuple[NDArray[np.int64], NDArray[np.int64]],
    vectors: NDArray[np.float16],
    identity: EncoderIdentity,
    external: ExternalEmbeddings,
) -> None:
    slide_id, grid_key = record.slide_id, grid.spec.key
    target.add_slide(record)
    # The other tool's patches are what it took for tissue; nothing is known of the others.
    tissue = np.zeros(grid.shape, np.uint8)
    tissue[positions] = 255
    if not target.grid_attrs(slide_id, grid_key).get("grid"):
        rgb = np.full((*grid.shape, 3), 255, np.uint8)
        survey = Survey(tissue, rgb, {"name": "imported", "from": external.format})
        target.add_grid(slide_id, grid, survey, software_versions())
    stored = target.grid(slide_id, grid_key)
    if stored.grid != grid or (stored.is_tissue != is_tissue(tissue)).any():
        raise StoreError(
            f"{slide_id}/{grid_key} is stored with other patches; import under another name with --slide-id, or clear it "
            f"with: histosge rm {target.location.label} --slide {slide_id} --grid {grid_key}"
        )
    # Stores of earlier versions have the file's hash among the encoder's facts: the same file goes on there.
    attrs = read_attrs(target.location, embedding_path(slide_id, grid_key, identity.key))
    earlier = {"imported_from": external.format, **external.provenance}
    if (attrs.get("encoder") or {}).get("facts") == earlier:
        identity = EncoderIdentity(identity.key, identity.dim, earlier)
    array = target.add_embedding(slide_id, grid, identity, attrs={"imported": external.provenance})
    target.consolidate(slide_id)
    index = np.full(grid.shape, -1, np.int64)
    index[positions] = np.arange(len(vectors))
    for block in array.missing(stored.planned(array.block_shape)):
        patches = index[block.slices]
        has_vector = patches >= 0
        values = np.full((*block.shape, identity.dim), np.nan, np.float16)
        values[has_vector] = vectors[patches[has_vector]]
        array.write(block, values)


def _vectors(
    external: ExternalEmbeddings, scale: float | None
) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
    """Return the vectors as they are stored, and which of them are not finite in the file.

    Raises
    ------
    StoreError
        If finite values do not fit in float16, or no vector is finite.
    """
    factor, largest = scale or 1.0, 0.0
    stored = np.empty(external.features.shape, np.float16)
    not_finite = np.zeros(len(stored), bool)
    for start in range(0, len(stored), ROWS):
        rows = slice(start, start + ROWS)
        # In float64 the test for what float16 can hold is exact.
        values = external.features[rows].astype(np.float64) * factor
        finite = np.asarray(np.isfinite(values).all(axis=1))
        not_finite[rows] = ~finite
        largest = max(largest, float(np.abs(values[finite]).max(initial=0.0)))
        values[~finite] = np.nan
        with np.errstate(over="ignore"):  # refused below
            stored[rows] = to_float16(values.astype(np.float32))[0]
    if not_finite.all():
        raise StoreError(f"{external.label}: none of its {len(stored)} vectors is finite")
    if largest > FLOAT16_MAX:
        # A power of two changes no digit of a value, only its exponent. One more than needed, for slides that follow.
        fitting = factor * 2.0 ** -(math.ceil(math.log2(largest / FLOAT16_MAX)) + 1)
        raise StoreError(
            f"{external.label} holds values up to {largest / factor:.6g}{f' (x {scale:g})' if scale else ''}, and a store's "
            f"float16 ends at {FLOAT16_MAX:.0f}; import all slides of this encoder with --scale {fitting:g}, which "
            "multiplies their vectors"
        )
    return stored, not_finite


def _read(path: Path, options: ImportOptions) -> ExternalEmbeddings:
    try:
        if path.is_dir():
            return read_raw2features(path, options.grid, options.encoder)
        # Not a pipe either, which would be waited on for ever.
        is_there = path.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have, a folder that may not be entered
        raise StoreError(f"{str(path)[:200]!r} cannot be read: {error}") from error
    if not is_there:
        raise StoreError(f"there is no file at {path}")
    return read_h5(path)


def _slide_record(external: ExternalEmbeddings, options: ImportOptions) -> tuple[float, SlideRecord]:
    slide_id = name_slide(options.slide_id or external.slide_id)
    if options.slide:
        source = as_url(options.slide)
        slide = open_slide(source, options.slide_mpp)
        size, mpp = slide.size_px, slide.mpp
        slide.close()
        return mpp, SlideRecord(slide_id, strip_credentials(source), size, mpp, slide_fingerprint(source))
    mpp = options.slide_mpp or external.mpp or 0.0
    if not mpp:
        raise MppError(f"{external.label} does not state the slide's microns per pixel; give --slide-mpp")
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise MppError(f"{external.label} states {mpp:g} microns per pixel of the slide; give --slide-mpp")
    external = external.in_level0_px(mpp)
    side = external.patch_side or find_step(external.corners)
    reach = external.corners.max(axis=0) + side
    size = external.size_px or (max(1, int(reach[0])), max(1, int(reach[1])))
    # Without the slide's file there is no fingerprint of it: the positions of the patches identify it as well as can be.
    corners = np.ascontiguousarray(external.corners.astype(np.int64))
    digest = hashlib.sha256(corners.tobytes()).hexdigest()
    return mpp, SlideRecord(slide_id, "", size, mpp, f"imported-{digest}")


def _check_inside(external: ExternalEmbeddings, record: SlideRecord, options: ImportOptions) -> None:
    """Refuse embeddings of another slide: by the size that their file states, and by where their patches are."""
    fix = "give the slide that they were made from with --slide"
    if external.size_px is not None and options.slide:
        far = max(abs(a - b) for a, b in zip(external.size_px, record.size_px, strict=True))
        if far > external.size_tolerance_px:
            stated, found = (f"{width} x {height} px" for width, height in (external.size_px, record.size_px))
            raise StoreError(
                f"{external.label} is of a slide of {stated}, and {record.source} has {found}; {fix}"
            )
    # A corner may be rounded, and the last patches may reach beyond the slide, which tools pad; a corner never is.
    beyond = (external.corners < -0.5).any(axis=1) | (external.corners >= record.size_px).any(axis=1)
    if beyond.any():
        x, y = external.corners[beyond][0]
        width, height = record.size_px
        raise StoreError(
            f"{external.label}: {int(beyond.sum())} of {len(external.corners)} patches begin beyond the slide's "
            f"{width} x {height} px, one at ({x:.0f}, {y:.0f}); {fix}"
        )


@dataclass(frozen=True)
class _Scale:
    """Side of the patches in px as the encoder saw them and in level-0 px, the step, and their microns per pixel."""

    patch_px: int
    side: float
    step: float
    effective_mpp: float


def _scale(external: ExternalEmbeddings, record: SlideRecord, options: ImportOptions) -> _Scale:
    patch_px = options.patch_px or external.patch_px
    side = external.patch_side
    found = find_step(external.corners)
    if side is None and options.mpp and patch_px:
        side = patch_px * options.mpp / record.mpp
        # CLAM cuts patches at a level whose mpp is only about the one that a user knows, as 0.5054 is 0.5.
        if found and abs(found / side - 1) <= LEVEL_TOLERANCE:
            side = found
    if patch_px is None or side is None:
        raise StoreError(f"{external.label} does not state the size of its patches; give --patch and --mpp")
    effective = record.mpp * side / patch_px
    if not MPP_RANGE[0] <= effective:
        raise MppError(
            f"{external.label}: patches would have {effective:.2g} microns per pixel; check --patch and --mpp"
        )
    if options.mpp and abs(effective / options.mpp - 1) > LEVEL_TOLERANCE:
        raise MppError(
            f"{external.label}: its patches have {effective:.4g} microns per pixel, and --mpp is {options.mpp:g}; leave one "
            "of --mpp and --patch out, or correct it"
        )
    return _Scale(patch_px, side, external.step or found or side, effective)


def _spots(
    external: ExternalEmbeddings, record: SlideRecord, options: ImportOptions, scale: _Scale
) -> PatchSpots:
    x, y = ((axis + scale.side / 2) * record.mpp for axis in external.corners.T)
    mpp = round(options.mpp or scale.effective_mpp, 4)
    return PatchSpots(mpp, scale.patch_px, record.mpp, scale.effective_mpp, x, y)


def _grid(
    external: ExternalEmbeddings, record: SlideRecord, options: ImportOptions, scale: _Scale
) -> tuple[PatchGrid, Lattice] | None:
    """Return the grid that the patches are on; None if they are on none."""
    side, step, effective = scale.side, scale.step, scale.effective_mpp
    stride = step * scale.patch_px / side
    whole = round(stride)
    if abs(stride - whole) > WHOLE_STRIDE:
        # Sides and steps are rounded to whole level-0 pixels: the step decides where the last patches are.
        if whole < 1 or abs(stride - whole) > (0.5 / step + 0.5 / side) * stride:
            return None
        effective = record.mpp * step / whole
    lattice = find_lattice(external.corners, step)
    off: NDArray[np.bool_] = np.asarray(~lattice.is_on)
    # With overlap TRIDENT takes the first step of a row or column without it: patches at 0 are off all others' grid.
    at_edge = np.asarray((external.corners < 0.5).any(axis=1))
    if off.any() and not (external.overlap and (at_edge | lattice.is_on).all() and lattice.is_on.any()):
        return None
    origin = lattice.origin_px
    # Four decimals, as in a grid's key.
    make = OffsetGridSpec if any(origin) else GridSpec
    spec = make(round(options.mpp or effective, 4), scale.patch_px, max(whole, 1))
    minimal = PatchGrid.for_slide(record.size_px, record.mpp, (effective,), spec, origin)
    # The grid may be larger than ours would be: other tools keep patches that reach beyond the slide.
    n_rows = max(minimal.n_rows, int(lattice.rows[lattice.is_on].max()) + 1)
    n_cols = max(minimal.n_cols, int(lattice.cols[lattice.is_on].max()) + 1)
    if n_rows * n_cols > MAX_CELLS:
        raise StoreError(
            f"{external.label}: {n_rows} x {n_cols} positions of patches {step:g} px apart, for {len(external.corners)} "
            "patches; check the slide's size and --patch"
        )
    return PatchGrid(spec, record.mpp, minimal.effective_mpp, n_rows, n_cols, origin), lattice
