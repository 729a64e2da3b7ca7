"""What is to be done for a slide: its metadata in the store, and the blocks that each encoder still lacks.

A block is done if its object exists: planning reads one listing per encoder, and no other record decides anything.
One process plans a slide; no other writes its metadata.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from featurestore.blocks import Block, whole_patches
from featurestore.credentials import strip_credentials
from featurestore.embedding.memory_model import worker_bytes
from featurestore.embedding.positions import patches_to_read
from featurestore.embedding.quality import (
    QualityPlan,
    plan_quality,
    quality_remark,
    skip_text,
    survey_without,
)
from featurestore.embedding.settings import NO_STAIN, EmbedSettings
from featurestore.embedding.slide_grid import check_block_fits, make_grid, resident_bytes
from featurestore.embedding.slide_result import SlideResult
from featurestore.embedding.stain_fit import fit_of_slide
from featurestore.embedding.tissue_choice import tissue_request
from featurestore.encoders.protocol import Encoder, patches_at_once
from featurestore.errors import IdentityMismatchError, SlideWarning, StoreError
from featurestore.grid import PatchGrid
from featurestore.names import slug
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import mpp_difference
from featurestore.slides.protocol import Slide
from featurestore.slides.sample_sheet import Sample
from featurestore.software import version
from featurestore.storage.block_array import BlockArray
from featurestore.storage.float16 import rows_without_nan
from featurestore.storage.layout import failure_path
from featurestore.storage.store import SlideRecord, Store, StoredGrid
from featurestore.tissue.flags import count_skipped, flag_shares
from featurestore.tissue.tissue_method import DEFAULT_TISSUE, TISSUE_METHODS


@dataclass(frozen=True)
class SlidePlan:
    """The work that is left for one slide.

    Parameters
    ----------
    sample, stored
        The slide, and its grid in the store.
    fingerprint
        Of the slide's file.
    missing, planned
        Encoder key -> blocks that it lacks, and all of its blocks that hold tissue, in row-major order. Blocks of two
        encoders differ where their arrays were made with different block shapes.
    remark
        What the user should know of the slide's scale and its mask; empty if there is nothing.
    quality
        What the run does with the grid's quality flags.
    """

    sample: Sample
    stored: StoredGrid
    fingerprint: str
    missing: dict[str, list[Block]]
    planned: dict[str, list[Block]]
    remark: str = ""
    quality: QualityPlan = field(default_factory=QualityPlan)

    @property
    def n_planned(self) -> int:
        """Objects that belong in the store, over all encoders."""
        return sum(map(len, self.planned.values()))


def plan_slide(
    store: Store,
    slide: Slide,
    sample: Sample,
    encoders: dict[str, Encoder],
    settings: EmbedSettings,
    check_duplicate: Callable[[str, str], None] = lambda slide_id, fingerprint: None,
) -> SlidePlan:
    """Write what is missing of a slide's metadata, and list the blocks that each encoder lacks.

    Parameters
    ----------
    check_duplicate
        Called with the slide's id and fingerprint before anything is written: raises for a slide that is another one.

    Raises
    ------
    IdentityMismatchError
        If the store holds this slide, grid or encoder from another source.
    SlideError
        If the slide cannot be read, or not at this scale.
    """
    slide_id = sample.slide_id
    grid = make_grid(slide, sample, settings.spec)
    check_block_fits(sample, grid, [e.identity.dim for e in encoders.values()], settings.block_shape)
    fingerprint = slide_fingerprint(sample.slide)
    check_duplicate(slide_id, fingerprint)
    store.add_slide(
        SlideRecord(slide_id, strip_credentials(sample.slide), slide.size_px, slide.mpp, fingerprint)
    )
    remarks = _add_grid(store, slide, sample, grid, settings)
    stored = store.grid(slide_id, grid.spec.key)
    fit = None if settings.stain == NO_STAIN else fit_of_slide(store, slide, stored, encoders, settings.stain)
    arrays = {
        key: store.add_embedding(
            slide_id,
            grid,
            encoder.identity,
            whole_patches(settings.block_shape, grid.tokens),
            attrs=None if fit is None else {"stain": fit.to_attrs()},
            coding=settings.coding,
        )
        for key, encoder in encoders.items()
    }
    if not store.is_consolidated(slide_id, [array.path for array in arrays.values()]):
        store.consolidate(slide_id)
    store.location.remove(failure_path(slide_id))  # it opened this time
    missing: dict[str, list[Block]] = {}
    planned: dict[str, list[Block]] = {}
    for key, array in arrays.items():
        # Here, since one process plans a slide: sweeping lists folders.
        store.location.sweep_partials(array.path)
        # Of each array, not of the settings: one of an earlier run may have another block shape.
        planned[key] = stored.planned(array.block_shape)
        missing[key] = array.missing(planned[key])
        if settings.retry_failed:
            absent = set(missing[key])
            missing[key] = [
                block for block in planned[key] if block in absent or has_failures(array, stored, block)
            ]
            _forget_failures(store, stored, key, missing[key])
    remark = "; ".join(filter(None, (mpp_difference(slide, sample.mpp), *remarks)))
    to_compute = {block for blocks in missing.values() for block in blocks}
    quality = plan_quality(store, slide, stored, to_compute, retried=settings.retry_failed)
    return SlidePlan(sample, stored, fingerprint, missing, planned, remark, quality)


def show_remark(remark: str) -> None:
    """Warn of what a plan remarks: in the process that the user sees, not in a worker's."""
    if remark:
        warnings.warn(remark, SlideWarning, stacklevel=2)


def _add_grid(
    store: Store, slide: Slide, sample: Sample, grid: PatchGrid, settings: EmbedSettings
) -> tuple[str, ...]:
    """Write a slide's grid, or check that the stored one is the same; return what the user should know of its mask."""
    slide_id = sample.slide_id
    attrs = store.grid_attrs(slide_id, grid.spec.key)
    request = tissue_request(settings, sample)
    if not attrs.get("grid"):
        found = survey_without(slide, grid, request, settings.skip)
        store.add_grid(slide_id, grid, found, software_versions())
        return (*found.remarks, quality_remark(found, sample.slide))
    clear = f"clear it with: histosge rm {store.location.label} --slide {slide_id} --grid {grid.spec.key}"
    if attrs["grid"] != grid.to_attrs():
        raise IdentityMismatchError(
            f"{slide_id}/{grid.spec.key} is stored as {attrs['grid']}, now it is {grid.to_attrs()}; {clear}"
        )
    if attrs.get("skip", []) != list(settings.skip):
        earlier, now = skip_text(attrs.get("skip")), skip_text(settings.skip)
        raise IdentityMismatchError(
            f"{slide_id}/{grid.spec.key} is stored with {earlier}, now it is {now}; go on with {earlier}, or {clear}"
        )
    stored_tissue = attrs["tissue"].get("name")
    # A grid that was imported names no method of ours. Its tissue is kept, unless another is named explicitly.
    is_ours = stored_tissue in TISSUE_METHODS.names()
    restricted = settings.masks or settings.within or settings.without
    if not is_ours and settings.tissue in (None, DEFAULT_TISSUE) and not restricted:
        return ()
    if stored_tissue != request.method:
        go_on = f"go on with --tissue {stored_tissue}, or " if is_ours else ""
        raise IdentityMismatchError(
            f"{slide_id}/{grid.spec.key} is stored with tissue by {stored_tissue!r}, now it is {request.method!r}; "
            f"{go_on}{clear}"
        )
    stored_region = attrs["tissue"].get("region")
    region = None if request.region is None else request.region.identity()
    if _region_text(stored_region) != _region_text(region):
        raise IdentityMismatchError(
            f"{slide_id}/{grid.spec.key} is stored with tissue within {_region_text(stored_region)}, now it is "
            f"{_region_text(region)}; go on with the earlier mask, --within and --without, or {clear}"
        )
    return ()


def _region_text(region: Any) -> str:
    """Return what decides a region: for a message, and to compare two of them."""
    if not isinstance(region, dict):
        return "the whole slide"
    parts = [f"mask {region.get('fingerprint')}"]
    for name in ("within", "without"):
        classes = region.get(name)
        parts += [f"--{name} {one}" for one in map(str, classes if isinstance(classes, list) else ())]
    return " ".join(parts)


def has_failures(array: BlockArray, stored: StoredGrid, block: Block) -> bool:
    """Tell whether a block that is stored lacks the vector of a tissue patch, or is damaged; it is read whole.

    The block itself decides, not the record of a failure, which may have been deleted or be older than the block.
    """
    try:
        values = array.read_block(block)
    except StoreError as error:  # its checksum or size is wrong: it cannot be used as it is
        if isinstance(error, OSError):  # a server or disk refused: that says nothing of the block
            raise
        return True
    rows = values.reshape(-1, values.shape[-1])
    tissue = stored.is_tissue[block.slices].ravel()
    return len(rows_without_nan(rows, tissue)) < int(tissue.sum())


def _forget_failures(store: Store, stored: StoredGrid, key: str, retried: list[Block]) -> None:
    """Remove records of failures in blocks that have none; the blocks to be retried keep theirs until they are whole."""
    grid_key, kept = stored.grid.spec.key, {block.index for block in retried}
    for name, record in list(store.block_failures(stored.slide_id)):
        index = tuple(record.get("block", ()))
        if name.startswith(f"{grid_key}/{slug(key)}/") and len(index) == 2 and index not in kept:
            store.location.remove(failure_path(stored.slide_id, grid_key, key, index))


def software_versions() -> dict[str, str]:
    """Return the versions of the packages that decide pixels and bytes, for a grid's attributes."""
    return {
        name: version(name)
        for name in ("histosge", "zarr", "numpy", "openslide-python", "simplejpeg", "tifffile")
    }


def dry_run_slide(
    slide: Slide,
    sample: Sample,
    encoders: dict[str, Encoder],
    settings: EmbedSettings,
    seconds_per_patch: Callable[[Slide, StoredGrid, list[Block]], float],
) -> tuple[SlideResult, StoredGrid]:
    """Survey a slide and estimate what embedding it takes; nothing is written.

    Parameters
    ----------
    seconds_per_patch
        Measures it on this device: slide, grid and blocks -> seconds.

    Returns
    -------
    (SlideResult, StoredGrid)
        The estimate, and what would be stored of the grid.
    """
    grid = make_grid(slide, sample, settings.spec)
    show_remark(mpp_difference(slide, sample.mpp))
    check_block_fits(sample, grid, [e.identity.dim for e in encoders.values()], settings.block_shape)
    found = survey_without(slide, grid, tissue_request(settings, sample), settings.skip)
    assert found.quality is not None  # only imported grids have none
    show_remark("; ".join(filter(None, (*found.remarks, quality_remark(found, sample.slide)))))
    stored = StoredGrid(sample.slide_id, grid, found.tissue, found.rgb)
    block_shape = whole_patches(settings.block_shape, grid.tokens)
    blocks = stored.planned(block_shape)
    # Blocks at the edges are stored with their padding, so all objects have the same size.
    patches_in_object = min(block_shape[0], grid.n_rows) * min(block_shape[1], grid.n_cols)
    # float16, and a CRC-32C of 4 bytes after the values.
    object_bytes = sum(2 * patches_in_object * e.identity.dim + 4 for e in encoders.values())
    patches = int(stored.is_tissue.sum())
    estimate = SlideResult(
        sample.slide_id,
        "planned",
        planned=len(blocks) * len(encoders),
        patches=patches,
        skipped=count_skipped(found.quality),
        flags=flag_shares(found.quality, stored.is_tissue),
        bytes_to_store=object_bytes * len(blocks),
        seconds=int(patches_to_read(stored.is_tissue, grid).sum()) * seconds_per_patch(slide, stored, blocks),
        worker_bytes=worker_bytes(
            resident_bytes(),
            grid,
            [encoder.identity.dim for encoder in encoders.values()],
            threads=1,
            batch=patches_at_once(encoders.values()),
            block_shape=block_shape,
            # The next one is planned, and its reading begins, before this one is closed.
            open_slides=2,
        ),
    )
    return estimate, stored


def blocks_to_read(plan: SlidePlan) -> dict[Block, tuple[str, ...]]:
    """Return each block that some encoder lacks, with the keys of those encoders, in row-major order of their corners."""
    wanted: dict[Block, tuple[str, ...]] = {}
    for key, blocks in plan.missing.items():
        for block in blocks:
            wanted[block] = (*wanted.get(block, ()), key)
    # By their patches: the indices of blocks of two shapes cannot be compared.
    return dict(sorted(wanted.items(), key=lambda item: (item[0].rows, item[0].cols)))
