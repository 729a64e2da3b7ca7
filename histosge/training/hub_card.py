"""README.md of a model's folder, in the card format of the model hubs: YAML for programs, then text for people.

A folder can be uploaded as it is. The card names no donor and no slide: `config.json` does, and the card says so.
"""

import json
from typing import Any

import numpy as np

from featurestore.encoders.records import find
from featurestore.grid import spec_from_values
from featurestore.software import version
from featurestore.wording import counted
from histosge.calibration.conformal import TRUSTED, Intervals
from histosge.calibration.wording import adapted_sentence, method_sentence, trust_sentence
from histosge.training.model_card import ModelCard, embed_options

README = "README.md"
SHOWN_GENES = 20
"""Of the most trusted, in the text; all of them are in ``config.json``."""


def write_card(card: ModelCard, intervals: Intervals | None, fingerprint: str) -> str:
    """Return the text of a model's README.md."""
    name = f"{card.preset} model of {counted(len(card.genes), 'gene')}"
    key = _code(card.encoder["key"])
    return _TEMPLATE.format(
        front_matter=_front_matter(card, intervals, name),
        name=name,
        key=key,
        version=version("histosge"),
        options=embed_options(spec_from_values(card.grid)),
        data=_data(card),
        encoder=_encoder(card),
        figures="\n\n".join(_figures(card, intervals)),
        fingerprint=fingerprint,
    )


_TEMPLATE = """{front_matter}

# {name}

Predicts spatial gene expression from H&E: one value of log1p(counts per 10,000) for each gene and patch, from embeddings of
`{key}`. Trained with histosge {version}.

## Use

```shell
histosge embed SLIDES STORE --encoder {key} {options}
histosge predict STORE MODEL OUT
```

`MODEL` is this folder, or `hf://OWNER/NAME` once it is on the hub.

## Training data

{data}

## Encoder

{encoder}

The encoder is not in this folder. Its licence also bounds what this model may be used for.

## Held-out figures

{figures}

## Controls

`histosge evaluate` scores this model's preset beside white noise, smooth noise (random fields as smooth as the genes are)
and library size alone, on sections of the user's; its report is no part of this folder. A gene that scores no better than
these controls has not been predicted from the tissue.

## Limits

Values are predictions, not measurements. They hold for tissue, stain and scanner like those of the training data. For
research only, not for diagnosis.

Fingerprint `{fingerprint}`. `config.json` holds all genes, the ids of the training slides and the names of their donors:
give other ids in the sample sheet before training if these must not be public.
"""


def _front_matter(card: ModelCard, intervals: Intervals | None, name: str) -> str:
    record = find(str(card.encoder["key"]))
    data: dict[str, Any] = {
        "library_name": "histosge",
        "tags": ["histosge", "pathology", "spatial-transcriptomics", "gene-expression", "h-and-e"],
        # What a model may be used for is its trainer's to say, within the encoder's licence.
        "license": "other",
        "license_name": "not-stated",
    }
    if record is not None and record.published is not None:
        data["base_model"] = record.published.repository
    if intervals is not None:
        trusted, middle = int(intervals.trusted.sum()), round(float(np.median(intervals.trust)), 4)
        metrics = [
            {"type": "trusted_genes", "name": f"genes with trust of at least {TRUSTED:g}", "value": trusted},
            {"type": "trust", "name": "median trust of all genes", "value": middle},
        ]
        data["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "spatial-gene-expression", "name": "Gene expression from H&E"},
                        "dataset": {
                            "type": "held-out-training-data",
                            "name": f"{intervals.n_spots} held-out spots of the training sections",
                        },
                        "metrics": metrics,
                    }
                ],
            }
        ]
    # Each value as JSON, which YAML contains: names of classes and genes need no other quoting.
    lines = [f"{key}: {json.dumps(value)}" for key, value in data.items()]
    return "\n".join(["---", *lines, "---"])


def _data(card: ModelCard) -> str:
    spots = sum(int(section["spots"]) for section in card.sections)
    named = counted(len(card.donors), "donor") if card.donors else "donors not named"
    grid, least = card.grid, card.normalisation.get("min_counts", 0)
    return (
        f"{counted(len(card.sections), 'section')}, {named}, {counted(spots, 'measured spot')}. "
        f"Target: {card.normalisation.get('target', '')}; "
        f"spots with fewer than {least} counts are left out. Grid: patches of {grid['patch_px']} px every "
        f"{grid['stride_px']} px at {grid['mpp']:g} µm per pixel.{_origin(card)}"
    )


def _origin(card: ModelCard) -> str:
    if card.origin is None:
        return ""
    n_new = len(card.sections) - int(card.origin["sections"])
    return (
        f" Adapted: it started from the weights of a model of {card.origin['sections']} of these sections "
        f"(fingerprint `{_code(card.origin['fingerprint'])[:16]}`) and was fitted to the other {n_new} alone, shrunk "
        "towards those weights."
    )


def _encoder(card: ModelCard) -> str:
    lines = []
    for encoder in card.encoder["facts"].get("encoders", [card.encoder]):
        record = find(str(encoder["key"]))
        if record is None:
            known = "not in histosge's records: its licence is its authors' to say"
            known = "part of histosge, MIT" if encoder["key"] in ("morphology", "colour") else known
        else:
            where = f", {record.published.repository}" if record.published else ""
            known = f"{record.title}{where}; licence of its weights: {record.licence or 'not recorded'}"
        fingerprint = str(encoder["fingerprint"])[:16]
        lines.append(
            f"- `{_code(encoder['key'])}`, {encoder['dim']} values, fingerprint `{fingerprint}`: {known}."
        )
    return "\n".join(lines)


def _figures(card: ModelCard, intervals: Intervals | None) -> list[str]:
    if intervals is None:
        return [
            "The model was not calibrated: no spots were held out, and it is not known which genes can be trusted."
        ]
    order = np.argsort(-intervals.trust, kind="stable")[:SHOWN_GENES]
    rows = [
        f"| {_cell(card.genes[i])} | {intervals.trust[i]:.2f} | ± {intervals.half_width[i]:.2f} |"
        for i in order
    ]
    level = round(100 * intervals.level)
    measured = (
        ""
        if card.origin is None
        else f" {adapted_sentence(len(card.sections) - int(card.origin['sections']))}"
    )
    return [
        f"{int(intervals.trusted.sum())} of {len(card.genes)} genes are trusted ({_cell(intervals.scope)}).{measured}",
        _cell(trust_sentence(intervals.n_spots, intervals.scope, by_effective_spots=bool(intervals.method))),
        # Without the donors' names.
        _cell(method_sentence(intervals.method, intervals.level, {})),
        "\n".join([f"| gene | trust | {level} % interval, log1p(CP10k) |", "|---|---|---|", *rows]),
    ]


def _cell(text: str) -> str:
    """Return text for a table: one line, without what Markdown or HTML would take for its own."""
    line = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    return line.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _code(text: str) -> str:
    return "".join(letter for letter in str(text) if letter.isprintable() and letter != "`")
