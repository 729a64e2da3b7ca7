"""The one place that imports timm, which needs torchvision, which may need mending first."""

from typing import Any

import torch

from featurestore.errors import EncoderError

_keep_alive: list[Any] = []


def mend_torchvision() -> None:
    """Define the operator schemas that a CUDA build of torchvision misses beside a CPU build of torch.

    Its compiled operators cannot load there, and two registrations on import are unguarded; timm needs the import.
    """
    if torch.version.cuda is not None or _keep_alive:
        return
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        try:
            library.define(schema)
        except RuntimeError:
            continue  # a CPU build of torchvision has defined it
    _keep_alive.append(library)


def import_timm() -> Any:
    """Return the module `timm`.

    Raises
    ------
    EncoderError
        If it cannot be imported.
    """
    mend_torchvision()
    try:
        import timm
    except ImportError as error:
        raise EncoderError(f"timm cannot be imported ({error}); install it with: pip install timm") from error
    return timm
