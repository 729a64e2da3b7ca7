"""Trust over many donors: read once, a few genes at a time."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from histosge.calibration import depth_strata, effective_spots
from histosge.calibration.conformal import measure_intervals
from histosge.calibration.embedding_distance import EmbeddingReference
from histosge.calibration.trust import OutOfFold, measure_trust
from histosge.heldout.metrics import correlate
from histosge.threads import FEW_THREADS

N_SPOTS, N_GENES, N_DONORS = 600, 30, 20


@dataclass
class Watched:
    """An array as it lies on disk: how much of it is read at once, and in all."""

    values: NDArray[np.float32]
    reads: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return N_SPOTS, N_GENES

    def __len__(self) -> int:
        return N_SPOTS

    def __getitem__(self, index: tuple[slice, slice | NDArray[np.int64]]) -> NDArray[np.float32]:
        found = self.values[index]
        self.reads.append(found.size)
        return found


def _spots(rng: np.random.Generator) -> OutOfFold:
    donor = np.repeat(np.arange(N_DONORS), N_SPOTS // N_DONORS)
    truth = rng.random((N_SPOTS, N_GENES), np.float32)
    # Genes follow their prediction, some of them the other way round on a few donors.
    predicted = truth + rng.random((N_SPOTS, N_GENES), np.float32) / 4
    for gene in range(N_GENES // 2):
        predicted[donor < gene // 3, gene] *= -1
    return OutOfFold(Watched(truth), Watched(predicted), rng.random((N_SPOTS, 2)) * 4000, donor, donor, donor)


def test_trust_reads_few_genes_at_a_time_however_many_donors_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_once = 4 * N_SPOTS
    for module in (depth_strata, effective_spots):
        monkeypatch.setattr(module, "_VALUES_AT_ONCE", at_once)
    spots = _spots(np.random.default_rng(1))
    measure_trust(spots)
    for watched in (spots.truth, spots.predicted):
        assert isinstance(watched, Watched)
        assert max(watched.reads) <= at_once
        assert sum(watched.reads) == 2 * N_SPOTS * N_GENES  # once for the limit, once for all donors


def test_intervals_and_trust_have_the_same_bits_on_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (depth_strata, effective_spots):
        monkeypatch.setattr(module, "_VALUES_AT_ONCE", 4 * N_SPOTS)
    rng = np.random.default_rng(2)
    spots, depth = _spots(rng), rng.normal(8, 1, N_SPOTS)
    # Shallow spots are noisier, so that strata are chosen, too.
    noise = rng.standard_normal((N_SPOTS, N_GENES)) * np.exp(8 - depth)[:, None]
    truth = (spots.predicted[:, :] + 3 + noise).astype(np.float32)
    spots = replace(spots, truth=truth, predicted=spots.predicted[:, :] + 3, depth=depth)
    reference, names = EmbeddingReference.from_moments([(np.zeros(3), np.ones(3))]), ("a", "b")
    one, three = (
        measure_intervals(spots, "donor", names * (N_DONORS // 2), reference, threads=threads)
        for threads in (1, 3)
    )
    assert one is not None
    assert three is not None
    assert one.strata is not None
    wanted = one.state()
    for name, array in three.state().items():
        np.testing.assert_array_equal(array, wanted[name])
    assert three.config() == one.config()


def test_few_threads_hold_values_however_many_cores_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    most, started = [0], ThreadPoolExecutor.__init__

    def counted(self: ThreadPoolExecutor, threads: int, *args: Any, **settings: Any) -> None:
        most[0] = max(most[0], threads)
        started(self, threads, *args, **settings)

    monkeypatch.setattr(ThreadPoolExecutor, "__init__", counted)
    reference = EmbeddingReference.from_moments([(np.zeros(3), np.ones(3))])
    spots = _spots(np.random.default_rng(3))
    assert (
        measure_intervals(spots, "donor", tuple(map(str, range(N_DONORS))), reference, threads=64) is not None
    )
    assert most == [FEW_THREADS]


def test_a_gene_that_fails_on_more_than_a_tenth_of_the_donors_is_not_trusted() -> None:
    spots = _spots(np.random.default_rng(2))
    truth, predicted = spots.truth[:, slice(None)], spots.predicted[:, slice(None)]
    failing = np.zeros(N_GENES)
    for donor in range(N_DONORS):
        here = spots.donor == donor
        failing += correlate(truth[here], predicted[here], spots.label[here])[0] <= 0
    trusted = measure_trust(spots) > 0
    np.testing.assert_array_equal(trusted, failing <= N_DONORS / 10)
    assert 0 < trusted[: N_GENES // 2].sum() < N_GENES // 2
