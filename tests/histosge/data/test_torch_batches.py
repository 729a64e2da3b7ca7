"""A loader under torch: `DataLoader` with and without workers, and a real training loop."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from _stores import Made, write_store
from torch.utils.data import DataLoader

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge import Loader, LoadSettings, SpotTargets
from histosge.data.shuffle_buffer import Batch
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort

MADE = Made((17, 23), 5, (7, 11), frame=3)
PATCHES = 3 * 14 * 20
SETTINGS = LoadSettings(batch=97, seed=3, buffer_mb=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_store(tmp_path_factory.mktemp("stores") / "store", 3, MADE).location.url


def _join(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def _places(batches: list[Batch]) -> list[tuple[int, ...]]:
    seen = _join(batches)
    return list(zip(seen.slide.tolist(), seen.rows.tolist(), seen.cols.tolist(), strict=True))


def test_tensors_are_what_the_loader_gives(store: str) -> None:
    loader = Loader(store, settings=SETTINGS)
    seen = list(DataLoader(loader.as_torch(), batch_size=None))
    for tensors, arrays in zip(seen, loader, strict=True):
        assert type(tensors) is Batch
        assert tensors.embedding.dtype == torch.float16
        assert all(np.array_equal(t.numpy(), a) for t, a in zip(tensors, arrays, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_share_the_blocks_epochs_differ_and_the_length_is_not_exceeded(
    store: str, workers: int, persistent: bool
) -> None:
    if persistent and not workers:
        return
    dataset = Loader(store, settings=SETTINGS).as_torch(num_workers=workers)
    data = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=persistent)
    expected = len(data)  # once and for all, as a trainer asks
    epochs = []
    for _ in range(12 if persistent else 3):
        batches = [batch for batch in data]  # noqa: C416  # list() would ask for the length again
        assert expected - workers <= len(batches) <= expected
        epochs.append(_places(batches))
    for places in epochs:
        assert len(places) == len(set(places)) == PATCHES
    assert epochs[0] != epochs[1] != epochs[2]
    dataset.set_epoch(1)
    assert _places(list(data)) == epochs[1]


def test_leaving_an_epoch_early_goes_on_with_the_next(store: str) -> None:
    def first(data: DataLoader[Batch]) -> list[int]:
        for batch in data:
            return batch.rows.tolist()
        return []

    dataset = Loader(store, settings=SETTINGS).as_torch(num_workers=1)
    data = DataLoader(dataset, batch_size=None, num_workers=1)
    seen = [first(data), first(data)]
    whole = Loader(store, settings=SETTINGS)
    assert seen == [next(whole.epoch(0)).rows.tolist(), next(whole.epoch(1)).rows.tolist()]


def test_another_number_of_workers_is_refused_with_what_to_write(store: str) -> None:
    data = DataLoader(Loader(store, settings=SETTINGS).as_torch(), batch_size=None, num_workers=1)
    with pytest.raises(ValueError, match=r"make it with as_torch\(num_workers=1\)"):
        list(data)


def test_ranks_and_workers_together_see_each_patch_once(store: str) -> None:
    seen: list[tuple[int, ...]] = []
    for rank in range(2):
        settings = LoadSettings(batch=97, seed=3, buffer_mb=1, rank=rank, world_size=2)
        dataset = Loader(store, settings=settings).as_torch(num_workers=2)
        batches = list(DataLoader(dataset, batch_size=None, num_workers=2))
        assert len(batches) == dataset._source.n_batches(0, 2)
        seen += _places(batches)
    assert len(seen) == len(set(seen)) == PATCHES


def test_a_process_that_inherits_no_memory_opens_the_store_for_itself(store: str) -> None:
    loader = Loader(store, ["S01"], settings=SETTINGS)
    list(loader)
    again = pickle.loads(pickle.dumps(loader))
    assert again.slide_ids == ("S01",)
    for a, b in zip(again, loader, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- a training loop

GRID = GridSpec(mpp=1.0, patch_px=48, stride_px=24)
COHORT = SyntheticSpec(
    size_px=(1208, 1128), mpp=0.5, genes=GeneCounts(6, 5, 3, 3), spot_diameter_um=41.0, spot_pitch_um=59.0
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    make_cohort(folder, COHORT, 3)
    settings = EmbedSettings(encoders=("colour",), spec=GRID, block_shape=(8, 8))
    embed(str(folder / "cohort.csv"), str(folder / "store"), settings)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_network_learns_from_spots_in_ten_lines(cohort: Path, workers: int) -> None:
    targets = SpotTargets.from_samples(cohort / "cohort.csv", cohort / "store", genes=6)
    loader = Loader(cohort / "store", targets=targets, settings=LoadSettings(batch=16, drop_last=True))
    data = DataLoader(loader.as_torch(num_workers=workers), batch_size=None, num_workers=workers)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(loader.dim), torch.nn.Linear(loader.dim, 6))
    optimiser = torch.optim.Adam(network.parameters(), lr=0.1)
    losses = []
    for _ in range(4 if workers else 12):
        for embedding, counts, library, *_ in data:
            target = torch.log1p(counts / library[:, None] * 1e4)
            loss = torch.nn.functional.mse_loss(network(embedding), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_a_trainer_needs_an_iterable_with_a_length_that_can_be_set_to_an_epoch(cohort: Path) -> None:
    targets = SpotTargets.from_samples(cohort / "cohort.csv", cohort / "store", genes=6)
    dataset = Loader(cohort / "store", targets=targets, settings=LoadSettings(batch=32)).as_torch()

    def fit(first_epoch: int, epochs: int) -> list[torch.Tensor]:
        """Go through epochs as a trainer does: ask for the length, set the epoch, stop after so many batches."""
        seen = []
        for number in range(first_epoch, first_epoch + epochs):
            dataset.set_epoch(number)
            length = len(dataset)
            batches = list(dataset)
            assert len(batches) == length == -(-len(targets) // 32)
            seen += [batch.embedding for batch in batches]
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = fit(0, 3)
        resumed = fit(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole[len(whole) // 3 :], resumed, strict=True))
