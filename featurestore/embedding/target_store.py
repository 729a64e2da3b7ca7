"""The store that a run writes to, and the ids of the run's slides in it."""

from collections.abc import Sequence

from featurestore.embedding.settings import EmbedSettings
from featurestore.errors import StoreNotFoundError
from featurestore.location import PathOrUrl
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.fingerprint_index import fingerprints
from featurestore.storage.private_map import number_samples
from featurestore.storage.store import Store


def open_target(
    url: PathOrUrl, samples: Sequence[Sample], settings: EmbedSettings
) -> tuple[Store, list[Sample]]:
    """Open the store of a run, made if there is none; return it, and the slides as they are named in it.

    Raises
    ------
    StoreError
        If it is no store, or keeps file names where the run may not leave any, or the reverse.
    """
    store = Store.open_or_create(url, private=settings.private)
    if store.private_map is None:
        return store, list(samples)
    return store, store.private_map.name_samples(samples, fingerprints(store))


def planned_names(url: PathOrUrl, samples: Sequence[Sample], settings: EmbedSettings) -> list[Sample]:
    """Return the slides as a dry run names them, which writes neither a store nor a list of names."""
    if not settings.private:
        return list(samples)
    try:
        stored = Store.open(url).private_map
    except StoreNotFoundError:
        stored = None
    return number_samples(samples) if stored is None else stored.look_up(samples)
