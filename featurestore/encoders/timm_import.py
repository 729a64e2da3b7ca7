"""The one place that imports timm, which needs torchvision, which may need a work-around first."""

from typing import Any

import torch

from featurestore.errors import EncoderError

# A library object that is collected takes its definitions with it.
_keep_alive: list[Any] = []


def define_torchvision_operators() -> None:
    """Define the operator schemas that a CUDA build of torchvision misses beside a CPU build of torch.

    Its compiled operators cannot load there, and two registrations on import are unguarded; timm needs the import.
    """
    # Beside a CUDA build of torch torchvision's own operators load, and a second definition would be an error.
    # Needed with torch 2.13.0 (CPU) and torchvision 0.28.0, of which there is no CPU build.
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
    define_torchvision_operators()
    try:
        import timm
    except ImportError as error:
        raise EncoderError(f"timm cannot be imported ({error}); install it with: pip install timm") from error
    return timm
