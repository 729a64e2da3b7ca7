"""The three public sections, each held out in turn: fast presets on two encoders, and the published network."""

from pathlib import Path

from _public import SPEC, public_sheet

from _results.part import Part, Record, Table, Values, source
from featurestore.embedding.embed import EmbedSettings, embed
from histosge.evaluation.evaluate import EvaluateSettings, evaluate
from histosge.evaluation.results import CONTROLS, SMOOTH_NOISE, Scores

ENCODERS = ("morphology", "colour")
METRICS = ("pearson_mean", "pearson_depth_adjusted", "mse")
GENES, SEEDS = 250, 3


def measure(folder: Path, quick: bool) -> Values:
    """Score the fast presets on the public sections with both encoders."""
    scores = _evaluate_public(folder, ENCODERS, ("mean", "depth", "ridge", "dense"))
    return _values(scores)


def measure_paper(folder: Path, quick: bool) -> Values:
    """Score the published network on the public sections."""
    return _values(_evaluate_public(folder, ENCODERS[:1], ("paper",)))


def _evaluate_public(folder: Path, encoders: tuple[str, ...], presets: tuple[str, ...]) -> Scores:
    sheet = public_sheet()
    if sheet is None:
        raise SystemExit("the public sections are absent: name their folder in HISTOSGE_DATA")
    embed(str(sheet), f"{folder}/store", EmbedSettings(encoders=encoders, spec=SPEC))
    settings = EvaluateSettings(split="section", presets=presets, genes=GENES, seeds=SEEDS, encoders=encoders)
    return evaluate(sheet, f"{folder}/store", folder / "report", settings)


def _values(scores: Scores) -> Values:
    found: Values = {}
    single = scores.encoders[0]
    for name in (*scores.presets, *scores.controls):
        # The control of all encoders together has no encoder in its name.
        label = name if scores.entries or name in CONTROLS else f"{name} on {single}"
        for metric in METRICS:
            found[f"{label}, {metric}"] = scores.mean(name, metric)
        spread = scores.values(name, "pearson_mean")
        found[f"{label}, sd"] = float(spread.std(ddof=1)) if len(spread) > 1 else 0.0
        if name not in CONTROLS:
            for fold in sorted({count.name for count in scores.folds}):
                found[f"{label}, fold {fold}"] = float(scores.values(name, "pearson_mean", fold).mean())
    return found


def sections_table(record: Record) -> str:
    """The three sections, `morphology` and `colour`."""
    value = record["sections"]["values"] | (record["paper"]["values"] if "paper" in record else {})
    rows = [
        ("`dense`", "dense", False),
        ("`depth` (oracle: uses the measured library sizes of the held-out spots)", "depth", False),
        ("`ridge`", "ridge", False),
        ("`paper`, 100 epochs", "paper", True),
    ]
    lines = [
        "| `morphology`, 164 numbers | Pearson | C2 / C3 / C4 | depth-adjusted | MSE |",
        "|---|---|---|---|---|",
    ]
    for title, preset, has_spread in rows:
        name = f"{preset} on morphology"
        if f"{name}, pearson_mean" not in value:
            continue
        folds = " / ".join(f"{value[f'{name}, fold {fold}']:.3f}".lstrip("0") for fold in ("C2", "C3", "C4"))
        pearson = f"{value[f'{name}, pearson_mean']:.3f}" + (
            f" ± {value[f'{name}, sd']:.3f}" if has_spread else ""
        )
        lines.append(
            f"| {title} | {pearson} | {folds} | {value[f'{name}, pearson_depth_adjusted']:z.3f} "
            f"| {value[f'{name}, mse']:.3f} |"
        )
    lines.append(f"| `mean` | 0 | | 0 | {value['mean on morphology, mse']:.3f} |")
    lines.append(
        f"| noise control (`ridge` on random embeddings, 20 draws, both encoders) | {value['noise, pearson_mean']:z.3f} ± "
        f"{value['noise, sd']:.3f} | | {value['noise, pearson_depth_adjusted']:z.3f} | {value['noise, mse']:.3f} |"
    )
    # Records of before this control have no such row.
    if f"{SMOOTH_NOISE}, pearson_mean" in value:
        pearson, sd, adjusted, mse = (
            value[f"{SMOOTH_NOISE}, {what}"]
            for what in ("pearson_mean", "sd", "pearson_depth_adjusted", "mse")
        )
        lines.append(
            f"| smooth-noise control (random embeddings that are smooth in space) | {pearson:z.3f} ± {sd:.3f} | | "
            f"{adjusted:z.3f} | {mse:.3f} |"
        )
    lines += ["", "| `colour`, 6 numbers | Pearson | depth-adjusted |", "|---|---|---|"]
    lines += [
        f"| `{preset}` | {value[f'{preset} on colour, pearson_mean']:.3f} | "
        f"{value[f'{preset} on colour, pearson_depth_adjusted']:.3f} |"
        for preset in ("dense", "ridge")
    ]
    sources = " ".join(source(record, part) for part in ("sections", "paper") if part in record)
    return "\n".join([*lines, "", sources])


def readme_sentence(record: Record) -> str:
    """The same sections in a sentence."""
    value = record["sections"]["values"]
    dense, ridge = (value[f"{name} on morphology, pearson_mean"] for name in ("dense", "ridge"))
    adjusted = value["dense on morphology, pearson_depth_adjusted"]
    paper = ""
    if "paper" in record:
        found = record["paper"]["values"]["paper on morphology, pearson_mean"]
        paper = f"the published HisToSGE network {found:.3f}, "
    return (
        "Three public sections of one breast tumour, each held out in turn, 250 genes, mean Pearson correlation per gene: "
        f"`dense` {dense:.3f},\n`ridge` {ridge:.3f}, {paper}noise "
        f"{value['noise, pearson_mean']:z.3f}. A large part of each figure is sequencing depth: after depth is\n"
        f"regressed out, `dense` scores {adjusted:.3f}."
    )


def encoders_table(record: Record) -> str:
    """The same sections by encoder."""
    value = record["sections"]["values"]

    def row(title: str, encoder: str) -> str:
        dense, ridge = (value[f"{preset} on {encoder}, pearson_mean"] for preset in ("dense", "ridge"))
        return f"| {title} | {dense:.3f} | {ridge:.3f} | {value[f'ridge on {encoder}, pearson_depth_adjusted']:.3f} |"

    return "\n".join(
        [
            "| | `dense` | `ridge` | `ridge`, depth-adjusted |",
            "|---|---|---|---|",
            row("`morphology`, 164 numbers", "morphology"),
            row("`colour`, 6 numbers", "colour"),
            f"| random numbers | | {value['noise, pearson_mean']:z.3f} | {value['noise, pearson_depth_adjusted']:z.3f} |",
        ]
    )


PARTS = (
    Part(
        "sections",
        "the three public sections ($HISTOSGE_DATA), two encoders, mean, depth, ridge and dense; about 6 minutes",
        measure,
        (
            Table("sections", sections_table),
            Table("readme", readme_sentence),
            Table("encoders", encoders_table),
        ),
    ),
    # Its figures are rows of the tables above, which leave them out until it has run.
    Part(
        "paper",
        "the published network on the same sections and `morphology`; the longest",
        measure_paper,
    ),
)
