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
    {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_", "div_", "trunc_normal_"}
)


class _NoInitialisation(TorchFunctionMode):
    """Leaves parameters as they are wherever they would be changed in place."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the parameter untouched, or call the function."""
        if args and isinstance(args[0], nn.Parameter) and getattr(func, "__name__", "") in _IN_PLACE:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_initialisation() -> Iterator[None]:
    """Leave the parameters of networks that are built in this context undefined; their buffers are right."""
    with _NoInitialisation():
        yield
