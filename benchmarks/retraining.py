"""What it costs to try another model: from the store, beside encoding the slide again.

python benchmarks/retraining.py [--quick] [--json FILE]
"""

import tempfile
from pathlib import Path

from _common import Result, options, report, section, timed

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.prediction.predict import predict
from histosge.training.train import TrainSettings, train

SPEC = GridSpec(mpp=0.5, patch_px=224, stride_px=112)


def main() -> None:
    """Measure one slide."""
    asked = options(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = section(folder, quick=asked.quick)
        sheet, store = folder / "samples.csv", str(folder / "store.zarr")
        sheet.write_text(f"slide,expression\n{made.slide.name},{made.expression.name}\n")
        encode, (embedded,) = timed(embed, str(sheet), store, EmbedSettings(spec=SPEC))
        results = [Result("patches", embedded.patches), Result("encoding the slide", encode, "s")]
        for preset in ("ridge", "dense"):
            settings = TrainSettings(preset, genes=50)
            model, maps = folder / preset, str(folder / f"{preset}.zarr")
            fit, _ = timed(train, str(sheet), store, model, settings)
            draw, _ = timed(predict, store, model, maps)
            results += [
                Result(f"{preset}: training", fit, "s"),
                Result(f"{preset}: predicting the slide", draw, "s"),
                Result(f"{preset}: speedup over encoding again", encode / (fit + draw), "x"),
            ]
    report("retraining", results, asked)


if __name__ == "__main__":
    main()
