"""A task of HEST-Benchmark as published: its splits, patches, counts and genes, read and encoded.

Layout as the public repository mahmoodlab/HEST reads it (``src/hest/bench/benchmark.py`` at afd42c3), in ``DIR/TASK``:
``splits/train_0.csv``, ``test_0.csv``, ... with columns ``sample_id, patches_path, expr_path``; ``patches/ID.h5`` with `img`
``(n, side, side, 3)``, `coords` (corners, level-0 px) and `barcode`; ``adata/ID.h5ad`` with raw counts; and
``var_50genes.json``. Patches are those of the benchmark, one a spot and on no grid: their embeddings are stored as
``spots-mpp..._px...`` of a feature store, and what is stored is not encoded again.
"""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.embedding.plan import software_versions
from featurestore.encoders.protocol import Encoder
from featurestore.errors import first_line
from featurestore.events import OnProgress, Progress, ignore_progress
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.sample_sheet import name_slide
from featurestore.storage.float16 import to_float16
from featurestore.storage.spots import PatchSpots, add_spots, read_spots
from featurestore.storage.store import SlideRecord, Store
from histosge.data.expression.foreign_files import check_hdf5, reading
from histosge.data.expression.loaded_expression import raw_counts, read_json, unique_names
from histosge.data.sections import Patches, Section, Spots
from histosge.errors import ExpressionError
from histosge.heldout.smooth_fields import spot_pitch_um

GENE_LIST = "var_50genes.json"
PATCH_UM = 112.0
"""Side of the benchmark's patches: 224 pixels of 0.5 µm."""
SPLIT_COLUMNS = ("sample_id", "patches_path", "expr_path")
BARCODES = ("barcode", "barcodes")
_PATCHES_AT_ONCE = 64
MAX_SIDE = 1024
"""Pixels: the benchmark has 224."""


@dataclass(frozen=True)
class BenchSample:
    """Where the parts of one sample are."""

    sample_id: str
    patches: Path
    expression: Path


@dataclass(frozen=True)
class BenchTask:
    """A task.

    Parameters
    ----------
    name
        Such as ``IDC``.
    folder
        Of the task.
    samples
        By id.
    splits
        Ids that each split trains on, and those that it holds out.
    genes
        In the order of the published list.
    """

    name: str
    folder: Path
    samples: dict[str, BenchSample]
    splits: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    genes: tuple[str, ...]


def read_task(bench: Path, name: str) -> BenchTask:
    """Read a task's splits and genes, and check that all files are there.

    Raises
    ------
    ExpressionError
        If there is no such task, a split is damaged, trains on what it holds out or names a sample whose files are
        missing, or the list of genes is none.
    """
    folder = bench / name
    if not name or Path(name).name != name or not (folder / "splits").is_dir():
        there = sorted(path.parent.name for path in bench.glob("*/splits")) if bench.is_dir() else []
        hint = ", ".join(get_close_matches(name, there, n=3) or there[:10]) or "no folder with splits"
        raise ExpressionError(f"{bench} holds no task {name[:80]!r}; there is {hint}")
    n_splits = len(list((folder / "splits").glob("test_*.csv")))
    samples: dict[str, BenchSample] = {}
    splits = []
    for number in range(n_splits):
        parts = []
        for part in ("train", "test"):
            rows = _read_split(folder, f"{part}_{number}.csv")
            samples |= {row.sample_id: row for row in rows}
            parts.append(tuple(row.sample_id for row in rows))
        if both := sorted(set(parts[0]) & set(parts[1])):
            raise ExpressionError(f"{folder}: split {number} trains on and holds out {', '.join(both[:3])}")
        splits.append((parts[0], parts[1]))
    if not splits:
        raise ExpressionError(
            f"{folder / 'splits'} holds no train_0.csv and test_0.csv; download the task's splits"
        )
    genes = read_json(_there(folder / GENE_LIST)).get("genes")
    if not isinstance(genes, list) or not genes or not all(isinstance(gene, str) for gene in genes):
        raise ExpressionError(f'{folder / GENE_LIST} should hold {{"genes": ["A", "B", ...]}}')
    return BenchTask(name, folder, samples, tuple(splits), tuple(dict.fromkeys(genes)))


def _there(path: Path) -> Path:
    if not path.is_file():
        raise ExpressionError(f"there is no {path}; download the task whole")
    return path


def _read_split(folder: Path, name: str) -> list[BenchSample]:
    file = _there(folder / "splits" / name)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise ExpressionError(f"{file} cannot be read: {first_line(error)}") from error
    found, missing = [], []
    for row in rows:
        if any(not row.get(column) for column in SPLIT_COLUMNS):
            raise ExpressionError(
                f"{file} should have the columns {', '.join(SPLIT_COLUMNS)}, filled in every row"
            )
        sample, *paths = (str(row[column]) for column in SPLIT_COLUMNS)
        for path in paths:
            # A split from elsewhere must not read files outside the task.
            if (
                not (folder / path).resolve().is_relative_to(folder.resolve())
                and not (folder / path).is_symlink()
            ):
                raise ExpressionError(f"{file}: {path[:200]!r} lies outside the task's folder")
            if not (folder / path).is_file():
                missing.append(f"{sample} ({path})")
        found.append(BenchSample(sample, folder / paths[0], folder / paths[1]))
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ExpressionError(
            f"{file} names samples whose files are missing: {shown}; download them, or take the split out"
        )
    if not found:
        raise ExpressionError(f"{file} names no sample")
    return found


@dataclass(frozen=True)
class BenchSpots:
    """One sample's patches, without their pixels, and the counts of their spots.

    Parameters
    ----------
    barcodes
        ``(n,)``, in the order of the patches.
    corners
        Level-0 px, ``(n, 2)``.
    counts
        Raw, ``(n, n_genes)``.
    genes
        Names of the columns.
    """

    barcodes: NDArray[np.str_]
    corners: NDArray[np.float64]
    counts: sparse.csr_matrix
    genes: tuple[str, ...]


def read_sample(sample: BenchSample) -> BenchSpots:
    """Read counts for the patches of a sample.

    Raises
    ------
    ExpressionError
        If a file is damaged, or a patch has no spot of its barcode.
    """
    import anndata

    with _patches(sample) as file:
        corners = np.asarray(file["coords"][:], dtype=np.float64)
        raw = file[_barcode_key(sample, file)][:].ravel()
    barcodes = np.array([b.decode() if isinstance(b, bytes) else str(b) for b in raw], dtype=np.str_)
    check_hdf5(sample.expression)
    with reading(sample.expression, "AnnData"):
        data = anndata.read_h5ad(sample.expression)
    row = {name: i for i, name in enumerate(data.obs_names.astype(str))}
    missing = [name for name in barcodes.tolist() if name not in row]
    if missing:
        raise ExpressionError(
            f"{sample.patches} holds {len(missing)} of {len(barcodes)} patches without a spot in {sample.expression.name}, "
            f"such as {missing[0]!r}"
        )
    counts = raw_counts(data.X, sample.expression)[[row[name] for name in barcodes.tolist()]]
    return BenchSpots(barcodes, corners, counts, unique_names(data.var_names.astype(str).tolist()))


@contextmanager
def _patches(sample: BenchSample) -> Iterator[Any]:
    """Open the patches of a sample, after their shapes were compared."""
    check_hdf5(sample.patches)
    with reading(sample.patches, "patches of HEST"), h5py.File(sample.patches) as file:
        for name in ("img", "coords"):
            if name not in file:
                raise ExpressionError(
                    f"{sample.patches} has no {name!r}: it holds {', '.join(file) or 'nothing'}"
                )
        shape, n = file["img"].shape, len(file[_barcode_key(sample, file)])
        if (
            len(shape) != 4
            or shape[3] != 3
            or file["img"].dtype != np.uint8
            or not 1 <= shape[1] == shape[2] <= MAX_SIDE
        ):
            raise ExpressionError(
                f"{sample.patches}: img is {file['img'].dtype} {shape}, and should be uint8 (n, side, side, 3)"
            )
        if file["coords"].shape != (shape[0], 2) or n != shape[0] or n == 0:
            raise ExpressionError(
                f"{sample.patches}: {shape[0]} patches, coords {file['coords'].shape} and {n} barcodes do not fit each other"
            )
        yield file


def _barcode_key(sample: BenchSample, file: Any) -> str:
    for name in BARCODES:
        if name in file:
            return name
    raise ExpressionError(f"{sample.patches} has no 'barcode': it holds {', '.join(file)}")


def embed_task(
    task: BenchTask, store: Store, encoder: Encoder, on_progress: OnProgress = ignore_progress
) -> dict[str, NDArray[np.float32]]:
    """Encode the patches of every sample that the store does not hold yet, and return sample id -> ``(n, dim)``.

    Raises
    ------
    IdentityMismatchError
        If the store holds other patches, or another encoder's vectors, under these names.
    ExpressionError
        If a vector is not finite.
    """
    found = {}
    for number, sample in enumerate(task.samples.values()):
        on_progress(Progress(number, len(task.samples), f"embedding {sample.sample_id}"))
        found[sample.sample_id] = _embed_sample(sample, store, encoder)
    return found


def _embed_sample(sample: BenchSample, store: Store, encoder: Encoder) -> NDArray[np.float32]:
    slide_id = name_slide(sample.sample_id)
    with _patches(sample) as file:
        corners, side = np.asarray(file["coords"][:], dtype=np.float64), int(file["img"].shape[1])
        # How many level-0 pixels a patch spans, where its writer noted it: the scale of positions, not of pixels.
        span = float(np.asarray(file["img"].attrs.get("patch_size_src", side)).ravel()[0])
        mpp = PATCH_UM / span
        centre = (corners + span / 2) * mpp
        spots = PatchSpots(PATCH_UM / side, side, mpp, PATCH_UM / side, centre[:, 0], centre[:, 1])
        reach = corners.max(axis=0) + span
        size = (max(1, int(reach[0])), max(1, int(reach[1])))
        store.add_slide(SlideRecord(slide_id, "", size, mpp, slide_fingerprint(str(sample.patches))))
        identity = encoder.identity
        stored = read_spots(store, slide_id, spots, identity)
        if stored is None:
            vectors = np.empty((len(corners), identity.dim), np.float16)
            for start in range(0, len(corners), _PATCHES_AT_ONCE):
                part = slice(start, start + _PATCHES_AT_ONCE)
                vectors[part] = to_float16(encoder.encode(file["img"][part]))[0]
            about = {"patches": f"HEST-Benchmark, {PATCH_UM:g} um"}
            add_spots(store, slide_id, spots, identity, vectors, about, software_versions())
            stored = vectors
    values = stored.astype(np.float32)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).any(axis=1).sum())
        raise ExpressionError(
            f"{sample.patches}: {bad} of {len(values)} vectors of {identity.key} are not finite"
        )
    return values


def bench_section(
    sample: BenchSample, spots: BenchSpots, embedding: NDArray[np.float32], donor: str
) -> Section:
    """Return a sample as a section whose spots have a patch each; spots without any count are left out."""
    counted = np.asarray(spots.counts.sum(axis=1)).ravel() > 0
    corners = spots.corners[counted]
    # Patches need places on a lattice for what is smooth in space: half a pitch, so that no two share one.
    step = max(spot_pitch_um(corners) / 2, 1.0)
    cols, rows = np.rint((corners - corners.min(axis=0)) / step).astype(np.int64).T
    patches = Patches(sample.sample_id, rows, cols, embedding[counted], step, step)
    n = int(counted.sum())
    measured = Spots(
        sample.sample_id,
        donor,
        spots.barcodes[counted],
        patches.xy_um,
        step,
        spots.counts[np.flatnonzero(counted)],
        spots.genes,
    )
    thumbnail = np.full((int(rows.max()) + 1, int(cols.max()) + 1, 3), 255, np.uint8)
    return Section(patches, measured, sparse.eye(n, format="csr", dtype=np.float64), thumbnail)


def missing_genes(genes: Sequence[str], there: Sequence[str]) -> list[str]:
    """Return the genes of a list that a sample did not measure."""
    known = set(there)
    return [gene for gene in genes if gene not in known]
