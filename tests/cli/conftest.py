"""Places for the commands to work on."""

import os
from pathlib import Path

import pytest

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.prediction.predict import predict
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge.training.train import TrainSettings, train

SPEC = SyntheticSpec(
    size_px=(808, 760), mpp=0.5, genes=GeneCounts(4, 3, 2, 2), spot_diameter_um=41.0, spot_pitch_um=59.0
)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a sheet, a store, a model and maps, and with things that are none of these; only for reading."""
    folder = tmp_path_factory.mktemp("world")
    sheet = make_cohort(folder / "data", SPEC, 2).sheet
    embed(sheet, folder / "store", EmbedSettings(encoders=("colour",), spec=GridSpec(1.0, 48, 48)))
    train(sheet, folder / "store", folder / "model", TrainSettings("mean", genes=3, intervals=False))
    predict(folder / "store", folder / "model", folder / "maps")
    for name in ("folder", "empty"):
        (folder / name).mkdir()
    (folder / "folder" / "mine.txt").write_text("mine")
    (folder / "file").write_text("mine")
    os.mkfifo(folder / "pipe")
    return folder
