"""Networks built without drawing their first weights: for shapes alone, or where a file fills them all.

Drawing them takes longer than reading them from a file (a ViT-S/16: 0.3 s; a ViT-g/14 of 1.1 billion: 15 s), and on the
meta device, where no number exists, torch 2.13 does it in Python.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

# What initialisers do with a parameter; everything else, such as the computation of buffers, is done as ever.
_IN_PLACE = frozenset(
    {"uniform_", "normal_", "erfinv_", "mul_", "add_", "div_", "clamp_", "zero_", "fill_"}
    | {"constant_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_"}
)


class _NoInitialisation(TorchFunctionMode):
    """Sets parameters to zero wherever they would be initialised in place."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the parameter, or call the function."""
        # Tensors' own methods are called with the parameter first, functions of torch.nn.init by its name.
        target = args[0] if args else (kwargs or {}).get("tensor")
        if isinstance(target, nn.Parameter) and getattr(func, "__name__", "") in _IN_PLACE:
            # Not left as it is: `trunc_normal_` of torch 2.13 draws again until no number lies beyond its limits.
            if not target.is_meta:
                target.detach().zero_()
            return target
        return func(*args, **(kwargs or {}))


@contextmanager
def without_initialisation() -> Iterator[None]:
    """Build networks in this context with zeros, or undefined numbers, for parameters; their buffers are right."""
    with _NoInitialisation():
        yield
