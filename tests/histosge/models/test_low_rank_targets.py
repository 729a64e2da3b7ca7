"""Patterns of genes: right whichever way they are computed, and for the whole transcriptome in little memory."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from histosge.models import low_rank_targets
from histosge.models.linear_algebra import principal_axes
from histosge.models.low_rank_targets import pattern_axes, standardise


def _targets(n_genes: int, n_spots: tuple[int, ...] = (67, 53)) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    loading = rng.standard_normal((4, n_genes)) * np.array([[4.0], [3.0], [2.0], [1.5]])
    return [
        (rng.standard_normal((n, 4)) @ loading + 0.5 * rng.standard_normal((n, n_genes))).astype(np.float32)
        for n in n_spots
    ]


@pytest.mark.parametrize("exact", [4000, 90, 10])
@pytest.mark.parametrize("n_genes", [71, 611])
def test_every_route_gives_the_principal_axes(
    exact: int, n_genes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank_targets, "MAX_EXACT", exact)
    targets = _targets(n_genes)
    expected = principal_axes(np.concatenate([standardise(t) for t in targets]), 4)
    found = pattern_axes(targets, 4)
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-8)
    np.testing.assert_allclose(np.abs((found * expected).sum(axis=0)), 1, atol=1e-4)


@pytest.mark.slow
def test_eighteen_thousand_genes_fit_in_a_gigabyte() -> None:
    """300 spots and 5,000 patches: 22 MB of targets, 360 MB of map."""
    script = textwrap.dedent("""
        import resource, numpy as np
        from histosge.models.dense import DenseModel
        from histosge.data.sections import Patches, TrainingSection
        from histosge.data.spot_overlap import disc_overlap
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rng = np.random.default_rng(0)
        rows, cols = (a.ravel() for a in np.mgrid[:50, :100])
        patches = Patches("S", rows, cols, rng.standard_normal((5000, 16)).astype(np.float32), 50.0, 100.0)
        xy = patches.xy_um[rng.choice(5000, 300, replace=False)]
        target = rng.random((300, 18_000), dtype=np.float32)
        model = DenseModel.fit([TrainingSection(patches, disc_overlap(xy, 55.0, patches), xy, target)])
        fitted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(model.predict(patches).shape, (fitted - base) // 1024,
              (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024,
              sum(a.nbytes for a in model.state().values()) // 2**20)
    """)
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    shape, fit_mb, peak_mb, model_mb = ran.stdout.rsplit(maxsplit=3)
    assert shape == "(5000, 18000)"
    assert int(fit_mb) < 250
    assert int(peak_mb) < 1000
    assert int(model_mb) < 4
