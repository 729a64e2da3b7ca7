"""Scores and a map without an evaluation."""

import numpy as np
import polars as pl

from histosge.evaluation.results import FoldCount, GeneMap, Scores

MAP_GRID = (17, 13)


def make_map(gene: str = "GENE1", role: str = "best") -> GeneMap:
    rng = np.random.default_rng(3)
    predicted = rng.random(MAP_GRID, dtype=np.float32)
    predicted[:, :2] = np.nan
    return GeneMap(
        gene,
        role,
        0.437,
        "A",
        rng.uniform(200, 500, (31, 2)),
        rng.random(31, dtype=np.float32),
        43.0,
        predicted,
        np.full((*MAP_GRID, 3), 181, dtype=np.uint8),
        53.0,
        53.0,
    )


def make_scores(noise: float = 0.002, split: str = "section", seeds: tuple[int, ...] = (0, 1)) -> Scores:
    metrics = ("pearson_mean", "pearson_depth_adjusted", "pearson_median", "pearson_top50", "spearman_mean")
    others = {"mse": 0.5, "mae": 0.6, "r2": 0.1, "n_genes": 2.0, "n_nan_genes": 1.0, "paper_all_spots": 0.9}
    rows, genes = [], []
    for preset, level in (("ridge", 0.3), ("dense", 0.4), ("noise", noise)):
        for fold in ("A", "B"):
            for seed in seeds:
                key = {"preset": preset, "split": split, "fold": fold, "seed": seed}
                values = dict.fromkeys(metrics, level + 0.01 * seed * (preset != "noise")) | others
                rows += [key | {"metric": metric, "value": value} for metric, value in values.items()]
                genes += [key | {"gene": gene, "pearson": level} for gene in ("GENE1", "GENE2")]
    return Scores(
        pl.DataFrame(rows),
        pl.DataFrame(genes),
        ("ridge", "dense"),
        "dense",
        split,
        seeds,
        211.0,
        "2 genes given by the user",
        tuple(FoldCount(seed, fold, 71, 31, 7) for seed in seeds for fold in ("A", "B")),
        (make_map(),),
        ("3 sections of 1 donor.",),
    )
