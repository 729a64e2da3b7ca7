"""A small cohort, the store that an undisturbed run makes of it, and a server to keep stores on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _s3 import Proxy, serving
from running import GRID, S3, Run, Start, contents

from featurestore.embedding.embed import EmbedSettings, embed
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort


@pytest.fixture
def start() -> Iterator[Start]:
    runs: list[Run] = []

    def begin(*arguments: object, **environ: str) -> Run:
        command = [sys.executable, "-m", "histosge_cli", *map(str, arguments)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        runs.append(Run(process))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.kill_group()


@pytest.fixture(scope="session")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = SyntheticSpec(size_px=(1800, 1700), genes=GeneCounts(2, 1, 1, 1))
    return make_cohort(tmp_path_factory.mktemp("slides"), spec, 3).sheet


@pytest.fixture(scope="session")
def undisturbed(sheet: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    results = embed(str(sheet), str(folder), EmbedSettings(spec=GRID))
    assert [r.state for r in results] == ["done"] * 3
    return contents(folder)


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3]:
    with serving(tmp_path / "objects") as server:
        proxy = Proxy(server.port)
        yield S3(server, proxy, tmp_path / "objects")
        proxy.close()
