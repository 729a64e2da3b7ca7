"""The demo's scores, and its maps against the truth."""

from pathlib import Path

import polars as pl

from _results.part import Part, Record, Table, Values, source
from histosge.demo import run_demo
from histosge.synthetic import SyntheticSpec


def measure(folder: Path, quick: bool) -> Values:
    """Run `histosge demo`: held-out scores by preset and, of `dense`, by gene family; the map against the truth."""
    spec = SyntheticSpec(size_px=(4400, 4200)) if quick else None
    found = run_demo(folder / "demo", spec)
    values = {f"held out, {preset}": value for preset, value in found.held_out.items()}
    values |= {f"truth, {family}": value for family, value in found.truth.items()}
    genes = pl.read_csv(found.paths["report"].parent / "genes.csv").filter(pl.col("preset") == "dense")
    # Families are known by their genes' names: GRAD01, MORPH01 ...
    gradients = genes.filter(pl.col("gene").str.starts_with("GRAD"))["pearson"].mean()
    return values | {"held out, dense, gradient": float(str(gradients))}


def demo_table(record: Record) -> str:
    """The demo's scores."""
    value = record["demo"]["values"]
    held_out = ", ".join(
        f"`{preset}` {value[f'held out, {preset}']:.3f}" for preset in ("dense", "ridge", "knn")
    )
    on_blocks = value["held out, dense, gradient"]
    gradients = f"on the slide that was trained on; {on_blocks:.2f} on held-out blocks"
    rows = [
        "| gene family | Pearson | |",
        "|---|---|---|",
        f"| tied to morphology | {value['truth, morphology']:.2f} | |",
        f"| slow gradients that the image does not show | {value['truth, gradient']:.2f} | {gradients} |",
        f"| noise | {value['truth, noise']:z.3f} | must be 0 |",
        "",
        f"Held-out blocks of spots, all 60 genes: {held_out}, noise {value['held out, noise']:z.3f}.",
        "",
        source(record, "demo"),
    ]
    return "\n".join(rows)


PARTS = (
    Part(
        "demo",
        "`histosge demo`: one synthetic slide with known truth; about 2 minutes",
        measure,
        (Table("demo", demo_table),),
    ),
)
