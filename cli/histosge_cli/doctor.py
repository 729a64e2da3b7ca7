"""What `histosge doctor` finds: versions, device, encoders, other packages' extensions, a store."""

import platform
import shutil
from importlib.metadata import PackageNotFoundError

from featurestore.cores import count_cores
from featurestore.encoders.loading import ENCODERS, load_encoder
from featurestore.encoders.records import records
from featurestore.errors import FeatureStoreError
from featurestore.slides.slide_reader import READERS
from featurestore.software import version
from featurestore.tissue.tissue_method import TISSUE_METHODS
from featurestore.wording import counted

STORAGE = {"s3fs": ("s3", "s3"), "gcsfs": ("gs", "gcs"), "adlfs": ("az", "azure")}
"""Package -> scheme of its URLs, and the extra that brings it."""
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
    *STORAGE,
)


def examine(store: str | None) -> tuple[list[str], bool]:
    """Return lines to print, and whether our own encoders and the store work."""
    lines = [f"python       {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"{name:12} {_version(name)}" for name in PACKAGES]
    lines += _device()
    lines.append(f"disk         {shutil.disk_usage('.').free / 1e9:.0f} GB free here")
    healthy = True
    for key, extension in ENCODERS.own.items():
        if extension.takes_weights:
            continue  # loading it would load its weights; `_published` tells whether they are here
        try:
            identity = load_encoder(key).identity
        except FeatureStoreError as error:
            lines.append(f"encoder      {key}: cannot be used: {error}")
            healthy = False
        else:
            lines.append(
                f"encoder      {key}: ready, {identity.dim} dims, fingerprint {identity.fingerprint[:16]}"
            )
    lines += _published()
    lines += other_packages()
    lines.append("encoder      timm:<name>: ready with --weights FILE, or --random-weights")
    if store is not None:
        line, answers = _store(store)
        lines.append(line)
        healthy = healthy and answers
    return lines, healthy


def other_packages() -> list[str]:
    """Return a line for each extension of another package: what it is, or why it cannot be used."""
    kinds = (("encoder", ENCODERS), ("slide reader", READERS), ("tissue", TISSUE_METHODS))
    lines = []
    for kind, registry in kinds:
        for name, point in registry.offered.items():
            try:
                state = f"offered by {point.value}: {registry.get(name).help}"
            except FeatureStoreError as error:
                state = f"cannot be used: {error}"
            lines.append(f"{kind:12} {name}: {state}")
    return lines


def _published() -> list[str]:
    """Tell of each encoder with published weights whether it can be used here now, or why not; equal states together."""
    from featurestore.encoders.author_packages import missing_package
    from featurestore.encoders.hub import has_token, hub_answers, in_cache

    # Once, not per encoder: without a network each question waits for its timeout.
    reachable, token = hub_answers(), has_token()
    groups: dict[str, list[str]] = {}
    for record in records().values():
        if not record.is_default or record.published is None:
            continue
        if record.package != "timm" and missing_package(record):
            state = f"need the package {record.package}"
        elif in_cache(record.published):
            state = "ready, weights are here"
        elif not reachable:
            state = "need their weights, and the hub cannot be reached from here: use --weights FILE"
        elif record.published.gated and not token:
            state = "gated: accept the licence on the hub, then run `hf auth login`, or use --weights FILE"
        else:
            state = "weights will be downloaded on first use"
        groups.setdefault(state, []).append(record.name)
    lines = [
        f"hub          {'answers' if reachable else 'cannot be reached'}, {'a' if token else 'no'} token"
    ]
    return lines + [f"encoders     {', '.join(names)}: {state}" for state, names in groups.items()]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        scheme, extra = STORAGE.get(name, ("", ""))
        return "not installed" + (
            f"; for {scheme}:// stores: pip install 'histosge[{extra}]'" if scheme else ""
        )


def _device() -> list[str]:
    import torch

    from featurestore.encoders.precision import device_dtypes

    can = ", ".join(device_dtypes(torch.device("cpu")))
    lines = [
        f"cpu          {count_cores().describe()}",
        f"threads      {torch.get_num_threads()} of torch, {can}",
    ]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        can = ", ".join(device_dtypes(torch.device("cuda")))
        lines.append(f"gpu          {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {can}")
    else:
        lines.append("gpu          none")
    return lines


def _store(url: str) -> tuple[str, bool]:
    from featurestore.credentials import strip_credentials
    from featurestore.storage.catalogue import catalogue

    label = strip_credentials(url)
    try:
        frame = catalogue(url)
    # OSError: what a server or a permission does is the answer here, not a bug.
    except (FeatureStoreError, OSError) as error:
        reason = str(error)
        return f"store        {reason if label in reason else f'{label}: {reason}'}", False
    done = frame.filter(frame["state"] == "done").height
    slides = counted(frame["slide"].n_unique(), "slide")
    return f"store        {label}: answers, {slides}, {done} of {frame.height} embeddings whole", True
