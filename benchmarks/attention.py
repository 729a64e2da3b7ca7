"""From how many spots on attention adds to the linear solution: a residual that starts at zero, and has to earn its place.

python benchmarks/attention.py [--quick] [--json FILE]

`dense` is fitted on k sections of a synthetic cohort. What it leaves over at spots that it was fitted without is
learned by one layer of attention over the patches around each spot; its last layer starts at zero, and it is
kept at the epoch with the least error on a section of those k that it does not train on, which is epoch 0 where
nothing helps. Beside it, the same residual sees the patch at the spot alone: what attention gives is the
difference of the two, the rest is a curve in place of a line. All are scored on sections that none has seen.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from _common import Result, options, report
from numpy.typing import NDArray
from torch import nn

from featurestore.embedding import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.metrics import correlate
from histosge.models.dense import DenseModel
from histosge.models.linear import Standardiser
from histosge.sections import TrainingSection
from histosge.synthetic import SyntheticSpec, make_cohort
from histosge.training import Selection, load_sections, training_section
from histosge.windows import neighbourhood, spots_from_patches

SPEC = GridSpec(mpp=0.5, patch_px=112, stride_px=56)
REACH = 4
"""Patches to each side of a spot: 81 in all, 252 µm wide."""
WIDTH, HEADS = 32, 4
EPOCHS, PATIENCE, BATCH = 30, 6, 64
LEARNING_RATE = 1e-3


class Residual(nn.Module):
    """The patch at the spot asks those around it: ``tanh(x + attention(x, window)) W``, W zero at the start.

    Positions are relative: one learned bias a head and place in the window.
    """

    def __init__(self, dim: int, n_genes: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(dim, WIDTH)
        self.query, self.pair = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.place = nn.Parameter(torch.zeros(HEADS, 1, (2 * REACH + 1) ** 2))
        self.out = nn.Linear(WIDTH, n_genes)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, window: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        """Map ``(batch, places, dim)`` and ``(batch, places)`` to ``(batch, n_genes)``."""
        tokens = self.inputs(window)
        centre = tokens[:, tokens.shape[1] // 2]

        def heads(values: torch.Tensor) -> torch.Tensor:
            return values.unflatten(-1, (HEADS, -1)).movedim(-2, 1)

        query = heads(self.query(centre)[:, None])
        key, value = (heads(part) for part in self.pair(tokens).chunk(2, dim=-1))
        mask = self.place.masked_fill(~exists[:, None, None], -torch.inf)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(torch.tanh(centre + seen.movedim(1, -2).flatten(-2)[:, 0]))


Windows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Embeddings, which places exist, and what is left over, per spot."""


def windows(section: TrainingSection, standardiser: Standardiser, left: NDArray[np.floating]) -> Windows:
    """Cut the window around the patch that each spot shares most with."""
    patches, centre = section.patches, np.asarray(section.overlap.argmax(axis=1)).ravel()
    index = neighbourhood(patches, REACH * patches.stride_um, REACH, centre).index
    embedding = standardiser.apply(patches.embedding[index]).astype(np.float32)
    return torch.from_numpy(embedding), torch.from_numpy(index >= 0), torch.from_numpy(left)


def learn(train: list[Windows], check: Windows, seed: int) -> tuple[Residual, int]:
    """Train until the section beside stops gaining; return the best network and its epoch, 0 for none."""
    torch.manual_seed(seed)
    every = tuple(torch.cat(parts) for parts in zip(*train, strict=True))
    network = Residual(every[0].shape[2], every[2].shape[1])
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    best, best_epoch, kept = np.inf, 0, {}
    for epoch in range(EPOCHS + 1):
        with torch.inference_mode():
            error = float(((network(check[0], check[1]) - check[2]) ** 2).mean())
        if error < best:
            best, best_epoch = error, epoch
            kept = {name: value.clone() for name, value in network.state_dict().items()}
        elif epoch - best_epoch >= PATIENCE:
            break
        for some in torch.randperm(len(every[0])).split(BATCH):
            loss = ((network(every[0][some], every[1][some]) - every[2][some]) ** 2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    network.load_state_dict(kept)
    return network, best_epoch


def without_window(cut: Windows) -> Windows:
    """Hide all places but the middle: the same residual, with nothing to attend to but the patch itself."""
    embedding, exists, left = cut
    middle = torch.zeros_like(exists)
    middle[:, exists.shape[1] // 2] = True
    return embedding, middle, left


def compare(training: list[TrainingSection], testing: list[TrainingSection]) -> dict[str, float]:
    """Return mean Pearson on the held-out sections: of `dense`, and with either residual on top."""
    model = DenseModel.fit(training)
    unseen = DenseModel.cross_fitted(training)
    standardiser = Standardiser.of(np.concatenate([s.patches.embedding for s in training]))
    cut = [windows(s, standardiser, s.target - guess) for s, guess in zip(training, unseen, strict=True)]
    linear = [spots_from_patches(s.overlap, model.predict(s.patches)) for s in testing]
    seen = [windows(s, standardiser, guess) for s, guess in zip(testing, linear, strict=True)]
    scores = {"dense": score(testing, linear)}
    for name, view in (("+ residual of the patch alone", without_window), ("+ attention", None)):
        learned = [view(one) if view else one for one in cut]
        network, epoch = learn(learned[:-1], learned[-1], seed=0)
        with torch.inference_mode():
            extra = [network(*(view(one) if view else one)[:2]).numpy() for one in seen]
        scores[name] = score(testing, [a + b for a, b in zip(linear, extra, strict=True)])
        scores[f"{name}: epoch kept"] = epoch
    return scores


def score(sections: list[TrainingSection], guesses: list[NDArray[np.float32]]) -> float:
    """Return the mean Pearson over genes and sections."""
    each = [
        correlate(s.target, guess, np.zeros(len(guess)))[0].mean()
        for s, guess in zip(sections, guesses, strict=True)
    ]
    return float(np.mean(each))


def main() -> None:
    """Compare at growing numbers of sections."""
    asked = options(__doc__)
    torch.set_num_threads(1)
    sizes, n_test, side = ((2, 4), 2, 2000) if asked.quick else ((2, 4, 8, 16), 3, 2600)
    with tempfile.TemporaryDirectory() as name:
        cohort = make_cohort(Path(name), SyntheticSpec(size_px=(side, side)), max(sizes) + n_test)
        embed(str(cohort.sheet), f"{name}/store", EmbedSettings(encoders=("colour",), spec=SPEC))
        loaded = load_sections(str(cohort.sheet), f"{name}/store", Selection())
    genes = loaded[0].section.spots.genes
    sections = [training_section(item.section, genes) for item in loaded]
    results = []
    for size in sizes:
        training = sections[:size]
        spots = sum(len(s.target) for s in training)
        for name, value in compare(training, sections[-n_test:]).items():
            unit = "epochs" if name.endswith("kept") else "Pearson"
            results.append(Result(f"{spots} spots: {name}", value, unit))
    report(f"attention (colour, {n_test} sections held out)", results, asked.json)


if __name__ == "__main__":
    main()
