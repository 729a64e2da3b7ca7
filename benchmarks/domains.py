"""How well spatial domains found in a predicted map follow the true tissue types.

A model is trained on one synthetic section and predicts another that it has not seen; domains come from one fixed
rule (histosge/domains.py) that sees no label. Beside it: domains of what was measured at that section's spots, of the
embeddings themselves, and of random numbers.

python benchmarks/domains.py [--quick] [--json FILE]
"""

import tempfile
from pathlib import Path

import numpy as np
from _common import Result, options, report

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.data.genes import select_target
from histosge.data.section_loading import Selection, load_sections, training_section
from histosge.evaluation.spatial_domains import find_domains, score_domains
from histosge.models.registry import load_preset
from histosge.synthetic import SyntheticSpec, Truth, load_truth, make_section

SPEC = GridSpec(mpp=0.5, patch_px=224, stride_px=112)
BACKGROUND = 0


def label_at(truth: Truth, xy_um: np.ndarray) -> np.ndarray:
    """Return the tissue type under each position, `BACKGROUND` where there is none."""
    step = float(truth.x_um[1] - truth.x_um[0])
    cols, rows = (np.floor(xy_um[:, axis] / step).astype(int) for axis in (0, 1))
    n_rows, n_cols = truth.label.shape
    return truth.label[np.clip(rows, 0, n_rows - 1), np.clip(cols, 0, n_cols - 1)].astype(np.int64)


def main() -> None:
    """Measure."""
    asked = options(__doc__)
    size = (3000, 3000) if asked.quick else (6000, 6000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = [make_section(folder, SyntheticSpec(size_px=size, seed=seed), f"S{seed}") for seed in (1, 2)]
        sheet, store = folder / "samples.csv", str(folder / "store.zarr")
        rows = "".join(f"{m.slide_id},{m.slide.name},{m.expression.name}\n" for m in made)
        sheet.write_text("slide_id,slide,expression\n" + rows)
        embed(str(sheet), store, EmbedSettings(spec=SPEC))
        train, test = (item.section for item in load_sections(str(sheet), store, Selection()))
        truth = load_truth(made[1].truth)
        genes = tuple(truth.genes)
        spots, patches = label_at(truth, test.spots.xy_um), label_at(truth, test.patches.xy_um)
        n_domains = len(np.unique(truth.label[truth.label > 0]))
        rng = np.random.default_rng(0)
        found = {"measured expression, spots": (select_target(test.spots, genes), spots)}
        for preset in ("dense", "ridge"):
            model = load_preset(preset).fit([training_section(train, genes)])
            found[f"{preset}, predicted map of an unseen section"] = (model.predict(test.patches), patches)
        found["embeddings of that section"] = (test.patches.embedding, patches)
        found["random numbers"] = (rng.standard_normal((len(patches), len(genes))), patches)
        results = [Result("tissue types (= domains)", n_domains), Result("patches", len(patches))]
        for what, (values, labels) in found.items():
            scores = score_domains(find_domains(values, n_domains), labels, BACKGROUND)
            results += [
                Result(f"{what}: ARI", float(scores.ari.mean()), f"± {scores.ari.std(ddof=1):.3f}"),
                Result(f"{what}: NMI", float(scores.nmi.mean()), f"± {scores.nmi.std(ddof=1):.3f}"),
            ]
    report("domains", results, asked)


if __name__ == "__main__":
    main()
