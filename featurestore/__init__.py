"""Slides in, chunked embeddings out. Knows nothing of genes.

Importing this loads neither torch nor dask: what is named below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurestore.embedding import EmbedSettings as EmbedSettings
    from featurestore.embedding import embed as embed
    from featurestore.encoder import load_encoder as load_encoder
    from featurestore.grid import GridSpec as GridSpec
    from featurestore.listing import catalogue as catalogue
    from featurestore.slide import open_slide as open_slide
    from featurestore.tree import open_store as open_store
    from featurestore.validation import validate as validate

_HOMES = {
    "EmbedSettings": "embedding",
    "GridSpec": "grid",
    "catalogue": "listing",
    "embed": "embedding",
    "load_encoder": "encoder",
    "open_slide": "slide",
    "open_store": "tree",
    "validate": "validation",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featurestore' has no attribute {name!r}")
    return getattr(import_module(f"featurestore.{_HOMES[name]}"), name)
