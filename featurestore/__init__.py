"""Slides in, chunked embeddings out. Knows nothing of genes.

Importing this loads neither torch nor dask: what is named below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurestore.embedding.embed import EmbedSettings as EmbedSettings
    from featurestore.embedding.embed import embed as embed
    from featurestore.encoders.loading import load_encoder as load_encoder
    from featurestore.grid import GridSpec as GridSpec
    from featurestore.slides.open_slide import open_slide as open_slide
    from featurestore.storage.catalogue import catalogue as catalogue
    from featurestore.storage.tree import open_store as open_store
    from featurestore.storage.validation import validate as validate

_HOMES = {
    "EmbedSettings": "embedding.embed",
    "GridSpec": "grid",
    "catalogue": "storage.catalogue",
    "embed": "embedding.embed",
    "load_encoder": "encoders.loading",
    "open_slide": "slides.open_slide",
    "open_store": "storage.tree",
    "validate": "storage.validation",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featurestore' has no attribute {name!r}")
    return getattr(import_module(f"featurestore.{_HOMES[name]}"), name)
