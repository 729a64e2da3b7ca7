"""From what a user names to what fits a model: a preset, a class of the user's own, or an object.

Three forms are taken everywhere, in Python and (the strings) on the command line:

    a string    a registered name (``ridge``), or ``module:Class``: the class is imported from the user's own path
    a class     with the members of `histosge.models.protocol.Model`
    an object   whose ``fit(sections, *, seed, epochs)`` returns a fitted model

Only what the caller names is imported. A name that stands in a saved model is never imported, see `load_saved_class`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, cast

from histosge.data.sections import TrainingSection
from histosge.errors import ModelError
from histosge.models.checkpoint import Checkpoint
from histosge.models.protocol import SQUARED_ERROR, Capabilities, Estimator, Model, capabilities
from histosge.models.registry import MODELS, load_preset

ModelSource = str | type[Model] | Estimator
"""What may stand for a model: a name, a class, or an object with `fit`."""
METHODS = ("fit", "predict", "config", "state", "from_state")
"""Without these a class cannot be trained, saved and loaded."""


@dataclass(frozen=True)
class NamedEstimator:
    """What fits a model, and the name that tables show.

    Parameters
    ----------
    name
        As the user wrote it; of a class or an object its ``name``, else ``module:Class``.
    estimator
        A class or an object.
    is_named
        Whether the user gave a string.
    """

    name: str
    estimator: Estimator
    is_named: bool

    @property
    def capabilities(self) -> Capabilities:
        """Return what it can do beyond the protocol."""
        return capabilities(self.estimator)

    def check_loss(self, loss: str) -> None:
        """Refuse a loss that it does not have.

        Raises
        ------
        ModelError
            Naming those that it has.
        """
        losses = self.capabilities.losses
        if loss not in losses:
            has = f"choose one of {', '.join(losses)}" if len(losses) > 1 else f"it has {losses[0]} alone"
            raise ModelError(f"preset {self.name!r} has no loss {loss!r}: {has}")

    def fit(
        self,
        sections: Sequence[TrainingSection],
        *,
        seed: int = 0,
        epochs: int | None = None,
        loss: str = SQUARED_ERROR,
        checkpoint: Checkpoint | None = None,
    ) -> Model:
        """Fit a model; only one that is resumable is given the checkpoint.

        Raises
        ------
        ModelError
            If what an object's `fit` returned is no model.
        """
        # A class that has neither losses nor checkpoints need not have the arguments.
        options: dict[str, Any] = {} if loss == SQUARED_ERROR else {"loss": loss}
        if checkpoint is not None and self.capabilities.resumable:
            options["checkpoint"] = checkpoint
        fitted = self.estimator.fit(sections, seed=seed, epochs=epochs, **options)
        # Only now: in a class `halo_um` may be a dataclass field without a value.
        _check_members(fitted, self.name, (*METHODS, "halo_um"))
        return fitted

    def saved_name(self, fitted: Model) -> str:
        """Return the name that stands in the card of a model that it fitted."""
        return self.name if self.is_named else class_name(type(fitted))


MAX_EPOCHS = 1_000_000
"""A mistyped number: at a millisecond an epoch, which nothing reaches, this takes 17 minutes a fit."""
MAX_SEED = 2**63 - 1
"""torch takes no larger one, numpy no negative one."""


def check_numbers(epochs: int | None, seed: int) -> None:
    """Refuse epochs and seeds that no model can take.

    Raises
    ------
    ModelError
        With the range.
    """
    if epochs is not None and not 1 <= epochs <= MAX_EPOCHS:
        raise ModelError(
            f"cannot train for {epochs} epochs; give 1 to {MAX_EPOCHS:,}, or none for the model's own"
        )
    if not 0 <= seed <= MAX_SEED:
        raise ModelError(f"seed {seed} is outside 0..{MAX_SEED}; any number in it will do")


def find_estimator(model: ModelSource) -> NamedEstimator:
    """Return what fits a model.

    Parameters
    ----------
    model
        A registered name, ``module:Class``, a class, or an object with `fit`.

    Raises
    ------
    ModelError
        If the name is unknown (the nearest are given), the module or class is not there, or members are missing.
    """
    if isinstance(model, str):
        found: Any = _import_named(model) if ":" in model else load_preset(model)
        name = model
    else:
        found = model
        own = getattr(model, "name", None)
        # A subclass of a preset inherits that preset's name; it must not pass for it.
        is_own = isinstance(own, str) and own not in MODELS.names()
        name = str(own) if is_own else class_name(model if isinstance(model, type) else type(model))
    # A class is checked before it is fitted; what an object makes is only known afterwards.
    if isinstance(found, type):
        _check_members(found, name, METHODS)
    elif not callable(getattr(found, "fit", None)):
        raise ModelError(
            f"{name!r} is no model: {type(found).__name__} has no fit(sections, *, seed, epochs); give a preset's name, "
            "module:Class, a class, or an object with fit"
        )
    return NamedEstimator(name, cast(Estimator, found), isinstance(model, str))


def class_name(cls: type) -> str:
    """Return the registered name of a class, or ``module:Class``."""
    # By identity: a class may bear the name of a preset without being it.
    own = getattr(cls, "name", None)
    if isinstance(own, str) and own in MODELS.names() and load_preset(own) is cls:
        return own
    return f"{cls.__module__}:{cls.__qualname__}"


def load_saved_class(
    saved_name: str, named: ModelSource | None, origin: str, made_with: str = ""
) -> type[Model]:
    """Return the class of a saved model.

    Parameters
    ----------
    saved_name
        From the model's card: a registered name is looked up; ``module:Class`` is only compared with `named`.
    named
        What the user named in this call, if anything.
    origin
        The model's folder, for messages.
    made_with
        Package and version that offered the model when it was trained, if another package did.

    Raises
    ------
    ModelError
        If it is not installed, must be named by the user, or the user named another one.
    """
    if named is None:
        # Importing runs code. A model folder may come from anybody, so its word is not enough.
        if ":" in saved_name:
            raise ModelError(
                f"{origin} was trained with the class {saved_name}, which is only imported if you name it: add "
                f"--preset {saved_name}, or in Python load_model({origin!r}, preset={saved_name!r})"
            )
        if made_with and saved_name not in MODELS.names():
            raise ModelError(
                f"preset {saved_name!r} is not installed: install the package that offers it (it was {made_with} when "
                "trained)"
            )
        return load_preset(saved_name)
    found = find_estimator(named)
    if not isinstance(found.estimator, type):
        raise ModelError(
            f"{found.name!r} is an object; name the class of the model that it fits, to load {origin}"
        )
    if not _is_same(saved_name, {found.name, class_name(found.estimator)}):
        raise ModelError(f"{origin} was trained with {saved_name!r}, not with {found.name!r}; name that one")
    return cast(type[Model], found.estimator)


def _is_same(saved_name: str, names: set[str]) -> bool:
    """Tell whether a saved name is one of those; a class of a script is ``__main__`` in one run and not in the next."""
    if saved_name in names:
        return True
    module, _, cls = saved_name.partition(":")
    parts = [name.partition(":") for name in names]
    return any(cls and cls == other and "__main__" in (module, theirs) for theirs, _, other in parts)


def _import_named(name: str) -> object:
    """Import what a user named as ``module:Class``; what the module itself raises is the user's to see."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise ModelError(f"{name!r} is no model: write module:Class, such as mypackage.models:MyModel")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        # One of the module's own imports that is missing keeps its traceback: it says where.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ModelError(
            f"{name!r}: there is no module {error.name!r} in the current folder or among the installed packages"
        ) from error
    found: object = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, dir(found), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ModelError(f"{name!r}: module {module_name!r} has no {attribute!r}{hint}")
        found = getattr(found, part)
    return found


def _check_members(model: object, name: str, members: Sequence[str]) -> None:
    missing = [member for member in members if not hasattr(model, member)]
    if missing:
        raise ModelError(
            f"{name!r} is no model: it has no {', '.join(missing)}; see the members of histosge.models.protocol.Model"
        )
