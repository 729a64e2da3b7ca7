"""Whether measured and predicted expression fall into the tissue types that are really there.

Positions are the tissue patches of a synthetic slide, whose types are known; the fixed rule of `histosge.domains`
never sees them. Beside the map stands random expression: smooth domains agree with smooth labels by chance.

python benchmarks/domains.py [--quick] [--json FILE]
"""

import tempfile
from pathlib import Path

import numpy as np
from _common import Result, options, report, section

from featurestore.embedding import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.domains import score_domains
from histosge.genes import select_target
from histosge.models.presets import load_preset
from histosge.synthetic import load_truth
from histosge.training import Selection, load_sections, resolve_genes, training_section

SPEC = GridSpec(mpp=0.5, patch_px=224, stride_px=112)


def main() -> None:
    """Measure one slide."""
    asked = options(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = section(folder, quick=asked.quick)
        sheet, store = folder / "samples.csv", str(folder / "store.zarr")
        sheet.write_text(f"slide,expression\n{made.slide.name},{made.expression.name}\n")
        embed(str(sheet), store, EmbedSettings(spec=SPEC))
        (loaded,) = load_sections(str(sheet), store, Selection())
        truth = load_truth(made.truth)
        spots, patches = loaded.section.spots, loaded.section.patches
        genes = resolve_genes([loaded.section], 50)
        fitted = load_preset("dense").fit([training_section(loaded.section, genes)])
        rng = np.random.default_rng(0)
        cases = {
            "measured spots": (select_target(spots, genes), spots.xy_um),
            "dense map": (fitted.predict(patches), patches.xy_um),
            "noise on the map's patches": (rng.standard_normal((len(patches), len(genes))), patches.xy_um),
        }
        results = []
        for what, (expression, xy_um) in cases.items():
            found = score_domains(expression, xy_um, _label(truth.label, truth.y_um, truth.x_um, xy_um))
            results += [
                Result(f"{what}: ARI, median of 20 seeds", float(np.median(found.ari))),
                Result(f"{what}: ARI, lowest", float(found.ari.min())),
                Result(f"{what}: NMI, median", float(np.median(found.nmi))),
            ]
    report("domains", results, asked.json)


def _label(label: np.ndarray, y_um: np.ndarray, x_um: np.ndarray, xy_um: np.ndarray) -> np.ndarray:
    """Return the tissue type at each position; 0 where there is none."""
    row = np.clip(np.searchsorted(y_um, xy_um[:, 1]), 0, len(y_um) - 1)
    col = np.clip(np.searchsorted(x_um, xy_um[:, 0]), 0, len(x_um) - 1)
    return np.asarray(label[row, col].astype(np.int64))


if __name__ == "__main__":
    main()
