"""Counts with a fixed stream of random numbers, and what scanpy chooses on them.

Run as a script it writes the truth anew, with scanpy and scikit-misc installed, which our own code does not need:
    python tests/histosge/seurat_truth.py > tests/histosge/seurat_truth.json
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

N_SPOTS, N_GENES, N_TOP = (53, 89, 61), 307, 41
TRUTH = Path(__file__).with_name("seurat_truth.json")
GENES = tuple(f"G{i:03}" for i in range(N_GENES))


def section_counts(section: int) -> NDArray[np.float64]:
    """Return counts of a section, ``(n_spots, n_genes)``: Poisson, some genes overdispersed, two of them constant."""
    # RandomState, not Generator: its streams are frozen by NumPy's policy, so the truth stays that of these counts.
    random = np.random.RandomState(section)
    shared = np.random.RandomState(97)
    mean, spread = 10 ** shared.uniform(-0.8, 2, N_GENES), shared.gamma(0.5, 0.4, N_GENES)
    rate = random.gamma(1 / (spread + 0.02), mean * (spread + 0.02), (N_SPOTS[section], N_GENES))
    counts = random.poisson(rate).astype(np.float64)
    counts[:, 11], counts[:, 23] = 0, 3
    return counts


def main() -> None:
    """Print what scanpy chooses in the first section alone, and in all three."""
    import anndata
    import scanpy as sc

    counts = [section_counts(i) for i in range(len(N_SPOTS))]
    truth: dict[str, list[str] | list[float]] = {}
    for name, parts in (("one", counts[:1]), ("three", counts)):
        found = anndata.AnnData(np.concatenate(parts).astype(np.float32))
        found.var_names = list(GENES)
        found.obs["section"] = np.repeat([f"S{i}" for i in range(len(parts))], [len(part) for part in parts])
        table = sc.pp.highly_variable_genes(
            found, flavor="seurat_v3", n_top_genes=N_TOP, batch_key="section", inplace=False
        )
        table.index = list(GENES)
        chosen = table[table["highly_variable"]].sort_values(
            ["highly_variable_rank", "highly_variable_nbatches"], ascending=[True, False]
        )
        truth[name] = chosen.index.tolist()
        truth[f"{name}, excess variance"] = table["variances_norm"].round(9).tolist()
    print(json.dumps(truth))


if __name__ == "__main__":
    main()
