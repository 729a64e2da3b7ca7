"""Several processes, started by `torchrun`, train the network that one trains."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge.training.saved_model import load_model

# One process and two see the same batches: no dropout, whose draws depend on who draws.
SCRIPT = """
    import json, sys
    import numpy as np
    from histosge.data.sections import Patches, TrainingSection
    from histosge.data.spot_overlap import disc_overlap
    from histosge.models.block_attention import AttentionModel
    from histosge.models.block_training import AttentionSettings
    from histosge.training.processes import is_first_process, joined

    def section(seed):
        rng = np.random.default_rng(seed)
        rows, cols = (axis.ravel() for axis in np.mgrid[:16, :16])
        z = rng.standard_normal((256, 5)).astype(np.float32)
        patches = Patches(f"S{seed}", rows, cols, z, 56.0, 56.0)
        target = 3 + (np.abs(z[:, :1]) < 0.7) * np.linspace(0.5, 1.5, 4) + 0.2 * rng.standard_normal((256, 4))
        overlap = disc_overlap(patches.xy_um, 50.0, patches)
        return TrainingSection(patches, overlap, patches.xy_um, target.astype(np.float32))

    settings = AttentionSettings(
        radii_um=(120.0, 120.0), width=16, heads=2, batch=3, epochs=4, dropout=0.0, feature_dropout=0.0
    )
    with joined():
        model = AttentionModel.fit([section(seed) for seed in range(8)], seed=3, settings=settings)
    if is_first_process():
        json.dump(model.facts, open(sys.argv[1], "w"))
"""


def _run(arguments: list[str], processes: int) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.mark.e2e
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    facts = []
    for processes in (1, 2):
        found = tmp_path / f"{processes}.json"
        ran = _run([str(script), str(found)], processes)
        assert ran.returncode == 0, ran.stderr
        facts.append(json.loads(found.read_text()))
    one, two = facts
    assert one["epochs"] == two["epochs"] > 0
    for curve in ("loss", "stopping_error", "judging_change", "reported_change"):
        np.testing.assert_allclose(two[curve], one[curve], rtol=0, atol=1e-5, err_msg=curve)
    assert one["loss"][-1] < one["loss"][0]


@pytest.mark.e2e
def test_the_command_in_two_processes_writes_one_model_and_prints_once(tmp_path: Path) -> None:
    spec = SyntheticSpec(size_px=(1400, 1400), genes=GeneCounts(2, 1, 1, 1))
    made = make_cohort(tmp_path / "cohort", spec, 6)
    store, model = str(tmp_path / "store"), tmp_path / "model"
    embed(
        str(made.sheet),
        store,
        EmbedSettings(encoders=("colour",), spec=GridSpec(mpp=0.5, patch_px=224, stride_px=112)),
    )
    arguments = ["-m", "histosge_cli", "train", str(made.sheet), store, str(model)]
    ran = _run([*arguments, "--preset", "attention", "--epochs", "2"], 2)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("fingerprint") == 1
    assert ran.stderr.count("attention: ") == 1
    saved = load_model(model)
    assert saved.card.preset == "attention"
    assert len(saved.model.config()["training"]["loss"]) == 2
    assert not model.with_name(".model.unfinished").exists()
