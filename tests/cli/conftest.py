"""The command line in this process: exit code, standard output, standard error."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.prediction.predict import predict
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge.training.train import TrainSettings, train
from histosge_cli import main

SPEC = SyntheticSpec(
    size_px=(808, 760), mpp=0.5, genes=GeneCounts(4, 3, 2, 2), spot_diameter_um=41.0, spot_pitch_um=59.0
)


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Histosge = Callable[..., Ran]


@pytest.fixture
def histosge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Histosge:
    def run(*arguments: object) -> Ran:
        monkeypatch.setattr("sys.argv", ["histosge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main.main()
        code = stopped.value.code
        return Ran(int(code or 0), *capsys.readouterr())

    return run


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
