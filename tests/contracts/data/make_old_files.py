"""Write what commit 6995a84 left in users' hands: run it with that commit's packages on the path.

    git worktree add /tmp/old 6995a84
    PYTHONPATH=/tmp/old:/tmp/old/cli python tests/contracts/data/make_old_files.py OUT.zip

The archive holds two small synthetic sections, the store that `embed` made of them,
one model folder per preset, the map of one slide, and what the models predicted.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from featurestore.embedding import EmbedSettings, embed
from featurestore.grid import GridSpec
from featurestore.store import Store
from histosge.prediction import predict
from histosge.saved import load_model
from histosge.stream import load_patches, open_embedded
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge.training import TrainSettings, train

GRID = GridSpec(mpp=1.0, patch_px=48, stride_px=24)
SPEC = SyntheticSpec(
    size_px=(1208, 1128), mpp=0.5, genes=GeneCounts(6, 5, 3, 3), spot_diameter_um=41.0, spot_pitch_um=59.0
)
PRESETS = ("dense", "dense+attention", "dense+spots", "paper", "ridge", "gp", "knn", "mean")


def main(out: Path) -> None:
    """Make everything in a temporary folder, and pack it."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "old"
        home.mkdir()
        make_cohort(home / "cohort", SPEC, 2)
        sheet, store = str(home / "cohort" / "cohort.csv"), str(home / "store.zarr")
        embed(sheet, store, EmbedSettings(encoders=("colour",), spec=GRID, block_shape=(7, 11)))
        first = Store.open(store).slide_ids()[0]
        expected = {}
        for preset in PRESETS:
            folder = home / "models" / preset
            settings = TrainSettings(preset, 13, epochs=2 if preset == "paper" else None)
            train(sheet, store, folder, settings)
            patches = load_patches(open_embedded(Store.open(store), first, None, None))
            expected[preset] = load_model(folder).model.predict(patches)
        predict(store, home / "models" / "dense", str(home / "maps.zarr"), slide_ids=[first])
        np.savez(home / "expected.npz", **expected)
        for truth in (home / "cohort").rglob("*.truth.npz"):
            truth.unlink()
        shutil.make_archive(str(out.with_suffix("")), "zip", home)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
