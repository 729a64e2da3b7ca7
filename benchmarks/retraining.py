"""What it costs to try another model: from the store, beside encoding the slide again.

python benchmarks/retraining.py [--quick] [--json FILE]
"""

import tempfile
from pathlib import Path

from _common import options, report, section, timed

from featurestore.embedding import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.prediction import predict
from histosge.training import TrainSettings, train

SPEC = GridSpec(mpp=0.5, patch_px=224, stride_px=112)


def main() -> None:
    """Measure one slide."""
    asked = options(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = section(folder, quick=asked.quick)
        sheet, store = folder / "samples.csv", str(folder / "store.zarr")
        sheet.write_text(f"slide,expression\n{made.slide.name},{made.expression.name}\n")
        encode, (result,) = timed(embed, str(sheet), store, EmbedSettings(spec=SPEC))
        rows = []
        for preset in ("ridge", "dense"):
            settings = TrainSettings(preset, genes=50)
            model, maps = folder / preset, str(folder / f"{preset}.zarr")
            fit, _ = timed(train, str(sheet), store, model, settings)
            draw, _ = timed(predict, store, model, maps)
            rows.append(
                {
                    "preset": preset,
                    "patches": result.patches,
                    "encode, s": encode,
                    "train, s": fit,
                    "predict the slide, s": draw,
                    "encode / (train + predict)": encode / (fit + draw),
                }
            )
    report("another model from the store, beside encoding again", rows, asked.json)


if __name__ == "__main__":
    main()
