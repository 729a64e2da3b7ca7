"""An option that is given twice where only one value is used is refused: the first value would be dropped in silence."""

from collections import Counter
from typing import Any

from typer.core import TyperCommand

from featurestore.errors import FeatureStoreError


def refusing_repeats(base: type[TyperCommand] | None) -> type[TyperCommand]:
    """Return a class of commands that refuses a repeated option unless the option takes several values."""
    parent = base or TyperCommand

    class Command(parent):  # type: ignore[valid-type, misc]
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            """Count options as they were typed, then parse as usual."""
            # `order` names a parameter each time that it occurs. A copy, since parsing empties the list.
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for parameter, times in Counter(order).items():
                is_single = parameter.param_type_name == "option" and not parameter.multiple
                # A switch that is given twice means what it means once.
                if times > 1 and is_single and not getattr(parameter, "is_flag", False):
                    name = max(parameter.opts, key=len)
                    raise FeatureStoreError(
                        f"{name} is given {times} times and takes one value; give it once"
                    )
            result: list[str] = super().parse_args(ctx, args)
            return result

    return Command
