"""What `histosge doctor` finds: versions, device, encoders, a store."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from featurestore.encoder import ENCODERS, load_encoder
from featurestore.errors import FeatureStoreError

PACKAGES = (
    "histosge",
    "torch",
    "timm",
    "zarr",
    "dask",
    "xarray",
    "anndata",
    "polars",
    "openslide-python",
    "tifffile",
    "s3fs",
)


def examine(store: str | None) -> tuple[list[str], bool]:
    """Return lines to print, and whether all that was asked for works."""
    lines = [f"python       {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"{name:12} {_version(name)}" for name in PACKAGES]
    lines += _device()
    healthy = True
    for key in ENCODERS:
        try:
            identity = load_encoder(key).identity
        except FeatureStoreError as error:
            lines.append(f"encoder      {key}: cannot be used: {error}")
            healthy = False
        else:
            lines.append(
                f"encoder      {key}: ready, {identity.dim} dims, fingerprint {identity.fingerprint[:16]}"
            )
    lines.append("encoder      timm:<name>: ready with --weights FILE")
    if store is not None:
        line, answers = _store(store)
        lines.append(line)
        healthy = healthy and answers
    return lines, healthy


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed" + ("; for s3:// stores: pip install 'histosge[s3]'" if name == "s3fs" else "")


def _device() -> list[str]:
    import torch

    lines = [f"cpu          {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        lines.append(f"gpu          {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        lines.append("gpu          none")
    return lines


def _store(url: str) -> tuple[str, bool]:
    from featurestore.listing import catalogue
    from featurestore.location import strip_credentials

    label = strip_credentials(url)
    try:
        frame = catalogue(url)
    except (FeatureStoreError, OSError) as error:
        return f"store        {label}: {error}", False
    done = frame.filter(frame["state"] == "done").height
    return (
        f"store        {label}: answers, {frame['slide'].n_unique()} slides, {done} of {frame.height} embeddings whole",
        True,
    )
