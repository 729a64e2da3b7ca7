"""Slides in, chunked embeddings out. Knows nothing of genes.

What is named below is the public interface. Importing this package loads neither torch nor dask: each name is
imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurestore.embedding.embed import EmbedSettings as EmbedSettings
    from featurestore.embedding.embed import embed as embed
    from featurestore.encoders.loading import load_encoder as load_encoder
    from featurestore.errors import FeatureStoreError as FeatureStoreError
    from featurestore.file_systems import anonymous_access as anonymous_access
    from featurestore.grid import GridSpec as GridSpec
    from featurestore.grid import TokenGridSpec as TokenGridSpec
    from featurestore.slides.open_slide import open_slide as open_slide
    from featurestore.slides.sample_sheet import read_samples as read_samples
    from featurestore.storage.catalogue import catalogue as catalogue
    from featurestore.storage.tree import open_store as open_store
    from featurestore.storage.validation import validate as validate

    __version__: str

_MODULES = {
    "EmbedSettings": "embedding.embed",
    "FeatureStoreError": "errors",
    "GridSpec": "grid",
    "TokenGridSpec": "grid",
    "anonymous_access": "file_systems",
    "catalogue": "storage.catalogue",
    "embed": "embedding.embed",
    "load_encoder": "encoders.loading",
    "open_slide": "slides.open_slide",
    "open_store": "storage.tree",
    "read_samples": "slides.sample_sheet",
    "validate": "storage.validation",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # Read on first use: looking through the installed packages takes longer than this import.
        from featurestore.software import version

        return version("histosge")
    if name not in _MODULES:
        raise AttributeError(f"module 'featurestore' has no attribute {name!r}")
    return getattr(import_module(f"featurestore.{_MODULES[name]}"), name)
