"""Help that is made from registries, when a command is used: importing the command line loads no model."""

from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand


def _models() -> str:
    from histosge.models.registry import MODELS

    # An empty line between them: typer joins lines that follow each other.
    return "\n\n".join(f"{record.name}: {record.help}" for record in MODELS.records())


def _model_names() -> str:
    from histosge.models.registry import MODELS

    return ", ".join(MODELS.names())


PLACEHOLDERS: dict[str, Callable[[], str]] = {
    "{models}": _models,
    "{model names}": _model_names,
}
"""Text in an option's help -> what it stands for."""


class RegistryHelp(TyperCommand):
    """A command whose options' help may hold `PLACEHOLDERS`."""

    # Typer makes every command of the app on each call; only the one that is used reads its parameters.
    @property
    def params(self) -> list[Any]:
        """The command's parameters, their help filled in."""
        for parameter in self._params:
            text = getattr(parameter, "help", None) or ""
            for placeholder, fill in PLACEHOLDERS.items():
                if placeholder in text:
                    text = parameter.help = text.replace(placeholder, fill())
        return self._params

    @params.setter
    def params(self, value: list[Any]) -> None:
        self._params = value
