"""Remove slides, grids or encoders from a store."""

from featurestore.errors import StoreError
from featurestore.location import PathOrUrl
from featurestore.names import slug
from featurestore.object_stores.hub_place import check_writable
from featurestore.storage.store import Store


def remove(
    url: PathOrUrl, slide: str | None, grid: str | None, encoder: str | None, *, dry_run: bool = False
) -> list[str]:
    """Remove what matches all the given names; return the paths.

    Parameters
    ----------
    url
        Folder or URL.
    slide, grid, encoder
        None matches any; at least one is needed.
    dry_run
        Remove nothing, only return the paths.

    Raises
    ------
    StoreError
        If no name was given, nothing matches, or the store is only read.
    """
    if slide is None and grid is None and encoder is None:
        raise StoreError("rm needs --slide, --grid or --encoder; to remove a whole store, delete its folder")
    if not dry_run:
        check_writable(url)
    store = Store.open(url)
    targets = list(_targets(store, slide, grid, encoder))
    if not targets:
        raise StoreError(
            f"nothing in {store.location.label} matches; see: histosge ls {store.location.label}"
        )
    if not dry_run:
        for target in targets:
            store.remove(*target)
    return ["/".join(part for part in target if part) for target in targets]


def _targets(
    store: Store, slide: str | None, grid: str | None, encoder: str | None
) -> list[tuple[str, str | None, str | None]]:
    known = sorted(set(store.slide_ids()) | set(store.failures()[0]))
    slides = [name for name in known if slide in (None, name)]
    if grid is None and encoder is None:
        return [(name, None, None) for name in slides]
    # Folders, not complete grids: one that was written half must be removable, too.
    grids = [(s, g) for s in slides for g in store.location.folders(s) if grid in (None, g)]
    if encoder is None:
        return [(s, g, None) for s, g in grids]
    return [(s, g, e) for s, g in grids for e in store.encoder_slugs(s, g) if e == slug(encoder)]
