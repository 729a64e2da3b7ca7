"""What a user imports: every exported name is there, and asking for one loads no more than it needs."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import featurestore

NAMES = {
    "EmbedSettings",
    "FeatureStoreError",
    "GridSpec",
    "TokenGridSpec",
    "catalogue",
    "embed",
    "load_encoder",
    "open_slide",
    "open_store",
    "read_samples",
    "validate",
}


def test_every_exported_name_is_there() -> None:
    assert set(featurestore.__all__) >= NAMES
    for name in NAMES:
        assert getattr(featurestore, name) is not None
    assert featurestore.__version__ == version("histosge")
    with pytest.raises(AttributeError, match="no attribute 'embedd'"):
        featurestore.embedd  # noqa: B018


def test_the_names_load_neither_torch_nor_dask() -> None:
    code = (
        f"import sys, featurestore; [getattr(featurestore, name) for name in {sorted(NAMES)}]; "
        "print(*sorted({'torch', 'timm', 'dask', 'distributed'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == [], "xarray imports dask when the tree is opened, not before"
