"""A HEST-1k folder and a HEST-Benchmark task in the published layouts, from made sections."""

import json
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from histosge.synthetic import SyntheticSpec, make_section

SPEC = SyntheticSpec(size_px=(1300, 1100), spot_diameter_um=41.0, spot_pitch_um=67.0)
TABLE = "HEST_v1_1_0.csv"


def write_hest(folder: Path, samples: dict[str, dict[str, Any]]) -> None:
    """Write ``st``, ``wsis``, ``metadata``, ``tissue_seg``, ``patches`` and the table.

    Parameters
    ----------
    samples
        Id -> what its metadata say beside the scale.
    """
    for name in ("st", "wsis", "metadata", "tissue_seg", "patches"):
        (folder / name).mkdir(parents=True)
    rows = []
    for number, (name, about) in enumerate(samples.items()):
        made = make_section(folder / "made", SyntheticSpec(**{**vars(SPEC), "seed": number + 1}), name)
        made.slide.rename(folder / "wsis" / f"{name}.tif")
        data = anndata.read_h5ad(made.expression)
        # As the authors have it: one library called ST, with a smaller picture and the scale of the spots.
        data.uns["spatial"] = {
            "ST": {
                "images": {"downscaled_fullres": np.zeros((7, 5, 3), np.uint8)},
                "scalefactors": {
                    "spot_diameter_fullres": SPEC.spot_diameter_um / SPEC.mpp,
                    "tissue_downscaled_fullres_scalef": 0.01,
                },
            }
        }
        data.write_h5ad(folder / "st" / f"{name}.h5ad")
        meta = {
            "id": name,
            "image_filename": f"{name}.tif",
            "pixel_size_um_embedded": None,
            "pixel_size_um_estimated": SPEC.mpp,
            "inter_spot_dist": SPEC.spot_pitch_um,
            **about,
        }
        (folder / "metadata" / f"{name}.json").write_text(json.dumps(meta))
        ring = [[9, 9], [1290, 9], [1290, 1090], [9, 1090], [9, 9]]
        feature = {
            "type": "Feature",
            "properties": {"tissue_id": 0},
            "geometry": {"type": "Polygon", "coordinates": [ring]},
        }
        (folder / "tissue_seg" / f"{name}_contours.geojson").write_text(
            json.dumps({"type": "FeatureCollection", "features": [feature]})
        )
        rows.append(meta)
    # With a byte order mark, as the published one.
    pd.DataFrame(rows).to_csv(folder / TABLE, index=False, encoding="utf-8-sig")


def write_bench(
    folder: Path,
    *,
    patients: int = 3,
    n_spots: int = 61,
    side: int = 32,
    n_genes: int = 70,
    signal: float = 1.0,
) -> Path:
    """Write a task of HEST-Benchmark, a sample for each patient, whose genes follow the colour of the patches."""
    for name in ("splits", "patches", "adata"):
        (folder / name).mkdir(parents=True)
    shared = np.random.default_rng(99)
    loading = shared.standard_normal((3, n_genes)) * signal
    genes = [f"G{i}" for i in range(n_genes)]
    for patient in range(patients):
        rng = np.random.default_rng(patient)
        place = np.stack(np.divmod(np.arange(n_spots), 9)[::-1], axis=1)
        colour = rng.uniform(60, 200, (n_spots, 3))
        noise = rng.normal(0, 12, (n_spots, side, side, 3))
        img = np.clip(colour[:, None, None] + noise, 0, 255).astype(np.uint8)
        rates = np.exp(((colour - 130) / 40) @ loading * 0.4 + shared.standard_normal(n_genes) * 0.1)
        depth = rng.lognormal(0, 0.3, n_spots)
        counts = rng.poisson(rates * depth[:, None] * 3).astype(np.float32)
        barcodes = np.array([f"{patient:03d}x{i:03d}" for i in range(n_spots)])
        data = anndata.AnnData(
            sparse.csr_matrix(counts), pd.DataFrame(index=barcodes), pd.DataFrame(index=genes)
        )
        data.obsm["spatial"] = place * 400.0 + 200.0
        data.write_h5ad(folder / "adata" / f"P{patient}.h5ad")
        # In another order, and not all of them: spots off tissue have no patch.
        order = rng.permutation(n_spots)[: n_spots - 4]
        with h5py.File(folder / "patches" / f"P{patient}.h5", "w") as file:
            file["img"] = img[order]
            file["coords"] = (data.obsm["spatial"][order] - 112).astype(np.int64)
            file.create_dataset("barcode", data=barcodes[order, None].astype("S"), dtype="S9")
    for held_out in range(patients):
        for part, ids in (
            ("train", [i for i in range(patients) if i != held_out]),
            ("test", [held_out]),
        ):
            lines = [f"P{i},patches/P{i}.h5,adata/P{i}.h5ad" for i in ids]
            text = "sample_id,patches_path,expr_path\n" + "\n".join(lines) + "\n"
            (folder / "splits" / f"{part}_{held_out}.csv").write_text(text)
    (folder / "var_50genes.json").write_text(json.dumps({"genes": genes[:50][::-1]}))
    return folder


def colour_vectors(patches: Path) -> np.ndarray:
    """Return mean and standard deviation of the colours of a sample's patches, ``(n, 6)``: embeddings by no encoder."""
    with h5py.File(patches) as file:
        img = file["img"][:].astype(np.float64)
    return np.concatenate([img.mean(axis=(1, 2)), img.std(axis=(1, 2))], axis=1).astype(np.float32)
