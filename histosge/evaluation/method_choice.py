"""From the names that a user gives to the methods of an evaluation, and what is left out of it and why."""

from collections.abc import Sequence

from histosge.errors import HistosgeError, ModelError
from histosge.evaluation.ablation import Reencode, is_variant, published_code
from histosge.evaluation.methods import DEPTH, LibrarySizeMethod, Method, ModelMethod
from histosge.evaluation.results import BASELINE, CONTROLS, MODEL
from histosge.heldout.splits import WITHIN_SECTION
from histosge.models.estimators import ModelSource, NamedEstimator, find_estimator
from histosge.models.registry import DEFAULT_PRESET, MODELS


def find_methods(
    presets: Sequence[ModelSource], split: str, reencode: Reencode | None = None
) -> tuple[tuple[Method, ...], tuple[str, ...]]:
    """Find what stands behind names.

    Parameters
    ----------
    presets
        Registered names, ``module:Class``, ``depth``, ``paper+SWITCH``, model classes, or objects with `fit`. Names
        that are repeated count once, and the controls are always there anyway.
    split
        Models that know only slides they were trained on are left out where whole slides are held out.
    reencode
        None where patches cannot be encoded again: switches that need it are left out.

    Returns
    -------
    methods, left_out
        The latter one sentence each.

    Raises
    ------
    HistosgeError
        If a name is unknown, two models have one name, or nothing is left.
    """
    found: dict[str, Method] = {}
    left_out: list[str] = []
    for preset in presets:
        if isinstance(preset, str) and (preset in CONTROLS or preset in found):
            continue
        # Before the models: `depth` and variants are no models, and another package could offer one of that name.
        if preset == DEPTH:
            found[DEPTH] = LibrarySizeMethod()
        elif isinstance(preset, str) and is_variant(preset) and preset not in MODELS.names():
            variant = published_code(preset, reencode)
            if variant is not None:
                found[variant.name] = variant
            else:
                left_out.append(
                    f"{preset} is left out: the slides cannot be read here, and it encodes their patches again."
                )
        else:
            estimator = find_estimator(preset) if _is_known(preset) else _unknown(str(preset))
            if estimator.capabilities.needs_position_on_slide and split not in WITHIN_SECTION:
                left_out.append(
                    f"{estimator.name} is left out: it only knows slides that it was trained on; split {split} holds "
                    "out whole ones."
                )
                continue
            # Rows of scores.csv are told apart by name alone.
            if estimator.name in found:
                raise HistosgeError(f"two models are named {estimator.name!r}: give one of them another name")
            found[estimator.name] = ModelMethod(estimator, estimator.name)
    if not found:
        reason = " ".join(dict.fromkeys(left_out)) or "no preset is named"
        raise HistosgeError(
            f"nothing to evaluate: {reason.removesuffix('.')}; add one, such as --presets ridge,dense"
        )
    return tuple(found.values()), tuple(dict.fromkeys(left_out))


def choose_shown(methods: Sequence[Method]) -> str:
    """Return the name of the method whose maps a report shows, and from which differences are taken.

    The default preset where it is among them, else the first model, else the last baseline: the training mean, whose
    map is flat, is usually named first.
    """
    models = [method.name for method in methods if method.kind == MODEL]
    baselines = [method.name for method in methods if method.kind.startswith(BASELINE)]
    names = [method.name for method in methods]
    default = [DEFAULT_PRESET] if DEFAULT_PRESET in names else []
    return [*default, *models, *reversed(baselines), *names][0]


def _is_known(preset: ModelSource) -> bool:
    return not isinstance(preset, str) or ":" in preset or preset in MODELS.names()


def _unknown(name: str) -> NamedEstimator:
    raise ModelError(
        f"unknown preset {name!r}: {MODELS.suggest(name)}; or {DEPTH}, paper+SWITCH, or module:Class of your own"
    )
