"""State arrays of a model's parts, kept in one dictionary under names with a prefix."""

from histosge.models.protocol import State


def nest(prefix: str, state: State) -> State:
    """Return arrays under ``prefix.name``."""
    return {f"{prefix}.{name}": array for name, array in state.items()}


def unnest(prefix: str, state: State) -> State:
    """Return the arrays of a prefix under their own names; empty where there are none."""
    return {
        name.removeprefix(f"{prefix}."): array
        for name, array in state.items()
        if name.startswith(f"{prefix}.")
    }
