"""What attention over the patches around adds to a linear solution: a small network that starts at zero.

    t_p = A z_p                                        z: standardised components of a patch's embedding
    s_p = sum_n softmax_n(q_p k_n' / sqrt(d) + b(|x_p - x_n|)) v_n      over the patches n of the window, per head
    r_p = W tanh(t_p + O s_p)                          in patterns; W and O are zero at the start

Positions enter by distance alone, in microns: b is a sum of bumps, per head. So a model moves to another slide, grid or
orientation. Tokens t are computed once per patch and shared by all windows that it is in. A spot is the mean of the
patches under it; in training one of them is drawn by the area that they share.

Terms
    window     the patches within a radius of one that is asked about, along either axis
    leftover   what the linear solution, fitted without a spot's section, leaves of its patterns
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional

from histosge.data.sections import Patches
from histosge.data.spot_overlap import neighbourhood
from histosge.models.linear_algebra import Floats, Standardiser

RADIUS_UM, STEPS = 256.0, 4
"""Half the side of a window, and places between its middle and its edge, at most: 81 in all."""
WIDTH, HEADS, DROPOUT = 32, 4, 0.1
BUMPS_UM, BUMP_UM = (0.0, 60.0, 120.0, 180.0, 240.0, 320.0), 50.0
"""Distances at which the bumps of the bias stand, and their standard deviation."""
EPOCHS = 60
"""Of the window, after twice as many of the patch alone. All are run: the error often rises for ten before it falls."""
BATCH, SPOTS_AN_EPOCH, SPOTS_A_CHECK = 64, 4000, 1000
LEARNING_RATE, DECAY = 3e-3, 0.02
_AT_ONCE = 2048


class AttentionNetwork(nn.Module):
    """Components of patches -> what to add to their patterns.

    Parameters
    ----------
    dim, n_patterns
        Length of the components, and of the output.

    Attributes
    ----------
    looks
        Whether it looks around; False gives the same as long as O is zero, for less.
    """

    def __init__(self, dim: int, n_patterns: int) -> None:
        super().__init__()
        self.looks = True
        self.tokens = nn.Linear(dim, WIDTH)
        self.query, self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.distance = nn.Parameter(torch.zeros(HEADS, len(BUMPS_UM)))
        self.drop = nn.Dropout(DROPOUT)
        self.out = nn.Linear(WIDTH, n_patterns, bias=False)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, components: Tensor, middle: Tensor, window: Tensor, distance_um: Tensor) -> Tensor:
        """Return what to add to the patterns of some patches, ``(n, n_patterns)``.

        Parameters
        ----------
        components
            Standardised, of all patches that are in any window, ``(n_patches, dim)``.
        middle
            Which of them are asked about, ``(n,)``.
        window
            Which of them each looks at, ``(n, n_places)``; -1 where there is none.
        distance_um
            From the middle of a window to each of its places, ``(n_places,)``.
        """
        if not self.looks:
            alone: Tensor = self.out(torch.tanh(self.drop(self.tokens(components[middle]))))
            return alone
        tokens = self.drop(self.tokens(components))
        own, places = tokens[middle], window.clamp(min=0)
        # `embedding` is a look-up whose gradients are added in a fixed order: the same bits every time.
        key, value = (_heads(functional.embedding(places, part(tokens))) for part in (self.key, self.value))
        bumps = torch.exp(-(((distance_um[:, None] - distance_um.new_tensor(BUMPS_UM)) / BUMP_UM) ** 2) / 2)
        bias = (self.distance @ bumps.T)[None, :, None].masked_fill((window < 0)[:, None, None], -torch.inf)
        query = _heads(self.query(own)[:, None])
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        added: Tensor = self.out(torch.tanh(own + self.mix(seen.transpose(1, 2).flatten(-2)[:, 0])))
        return added


def _heads(values: Tensor) -> Tensor:
    """Turn ``(n, places, width)`` into ``(n, heads, places, width / heads)``."""
    return values.reshape(*values.shape[:2], HEADS, -1).transpose(1, 2)


@dataclass(frozen=True)
class Windows:
    """The windows around some patches of one slide, ready for a network.

    Parameters
    ----------
    components, middle, window, distance_um
        See `AttentionNetwork.forward`.
    """

    components: Tensor
    middle: Tensor
    window: Tensor
    distance_um: Tensor

    @classmethod
    def around(
        cls, patches: Patches, standardiser: Standardiser, radius_um: float, of: NDArray[np.int64]
    ) -> Self:
        """Cut windows around the patches `of`; embeddings are components, and only those in a window are kept."""
        around = neighbourhood(patches, radius_um, STEPS, of)
        needed = np.unique(around.index[around.index >= 0])
        place = np.full(len(patches) + 1, -1)  # the last, found by -1, stays -1
        place[needed] = np.arange(len(needed))
        return cls(
            torch.from_numpy(standardiser.apply(patches.embedding[needed]).astype(np.float32)),
            torch.from_numpy(place[of]),
            torch.from_numpy(place[around.index]),
            torch.from_numpy(np.hypot(*around.offset_um.T).astype(np.float32)),
        )

    def ask(self, network: AttentionNetwork, some: Tensor | slice) -> Tensor:
        """Return what a network adds to some of the patches; of the others only those in their windows are looked at."""
        window = self.window[some]
        needed, place = torch.unique(torch.cat([self.middle[some], window.flatten()]), return_inverse=True)
        none = int(needed[0] < 0)  # -1, which comes first
        place = place - none
        middle, window = place[: len(window)], place[len(window) :].reshape(window.shape)
        added: Tensor = network(self.components[needed[none:]], middle, window, self.distance_um)
        return added

    def ask_all(self, networks: Sequence[AttentionNetwork]) -> NDArray[np.float32]:
        """Return the mean of what networks add to every patch, ``(n, n_patterns)``."""
        with torch.inference_mode():
            parts = [
                torch.stack([self.ask(network, slice(at, at + _AT_ONCE)) for network in networks]).mean(dim=0)
                for at in range(0, len(self.middle), _AT_ONCE)
            ]
        return np.asarray(torch.cat(parts).numpy())


@dataclass(frozen=True)
class Lesson:
    """One section to learn from: windows around the patches under its spots, and what is left over there.

    Parameters
    ----------
    windows
        Around the patches under any spot.
    overlap
        Of the spots with those, ``(n_spots, n)``.
    leftover
        Per spot, ``(n_spots, n_patterns)``.
    """

    windows: Windows
    overlap: sparse.csr_matrix
    leftover: Floats

    @classmethod
    def of(
        cls,
        patches: Patches,
        overlap: sparse.csr_matrix,
        leftover: Floats,
        standardiser: Standardiser,
        radius_um: float,
    ) -> Self:
        """Cut the windows that a section's spots need."""
        under = np.unique(overlap.indices).astype(np.int64)
        windows = Windows.around(patches, standardiser, radius_um, under)
        return cls(windows, sparse.csr_matrix(overlap[:, under]), leftover)

    def take(self, spots: NDArray[np.int64]) -> "Lesson":
        """Return what some of the spots need."""
        overlap, whole = self.overlap[spots], self.windows
        under = np.unique(overlap.indices)
        some = torch.from_numpy(under.astype(np.int64))
        windows = replace(whole, middle=whole.middle[some], window=whole.window[some])
        return Lesson(windows, sparse.csr_matrix(overlap[:, under]), self.leftover[spots])

    def draw(self, spots: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        """Draw one patch under each spot, by the area that they share; every spot has one."""
        up_to = np.cumsum(self.overlap.data)
        first, last = self.overlap.indptr[spots], self.overlap.indptr[spots + 1] - 1
        low = np.where(first > 0, up_to[first - 1], 0.0)
        wanted = low + rng.random(len(spots)) * (up_to[last] - low)
        place = np.clip(np.searchsorted(up_to, wanted, side="right"), first, last)
        return torch.from_numpy(self.overlap.indices[place].astype(np.int64))

    def predict(self, network: AttentionNetwork) -> Floats:
        """Return what a network adds at the spots, ``(n_spots, n_patterns)``."""
        return np.asarray(self.overlap @ self.windows.ask_all([network]).astype(np.float64))


@dataclass(frozen=True)
class Taught:
    """A network at its best epoch, in evaluation mode.

    Parameters
    ----------
    alone, looking
        Epochs kept of the patch alone, and then of its window; 0 where they gained nothing.
    """

    network: AttentionNetwork
    alone: int
    looking: int


def teach(lessons: Sequence[Lesson], check: Sequence[Lesson], seed: Sequence[int], epochs: int) -> Taught:
    """Train on some sections, and keep what has the least squared error on others, at about `SPOTS_A_CHECK` spots.

    The patch alone comes first, which is a curve in place of a line; then, from the best of that, its window. A
    window that is learned from at once is learned by heart.

    Parameters
    ----------
    seed
        Same seed, same machine: the same network, bit for bit.
    epochs
        Of the window, and half of those of the patch alone: passes over the spots, or over `SPOTS_AN_EPOCH` of them.
    """
    every = -(-sum(len(one.leftover) for one in check) // SPOTS_A_CHECK)
    check = [one.take(np.arange(0, len(one.leftover), every)) for one in check]
    rng = np.random.default_rng(seed)
    dim, n_patterns = lessons[0].windows.components.shape[1], lessons[0].leftover.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**31)))
        network, kept = AttentionNetwork(dim, n_patterns), []
        for network.looks, passes in ((False, 2 * epochs), (True, epochs)):
            kept.append(_learn(network, lessons, check, rng, passes))
    return Taught(network.eval(), *kept)


def _learn(
    network: AttentionNetwork,
    lessons: Sequence[Lesson],
    check: Sequence[Lesson],
    rng: np.random.Generator,
    epochs: int,
) -> int:
    """Train, bring the network back to its best epoch, and return that: 0 if none gained."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)
    best, kept, state = np.inf, 0, network.state_dict()
    for epoch in range(epochs + 1):
        network.eval()
        error = sum(float(((one.predict(network) - one.leftover) ** 2).sum()) for one in check)
        if error < best:
            best, kept = error, epoch
            state = {name: value.clone() for name, value in network.state_dict().items()}
        if epoch < epochs:
            network.train()
            _one_epoch(network, optimiser, lessons, rng)
    network.load_state_dict(state)
    return kept


def _one_epoch(
    network: AttentionNetwork,
    optimiser: torch.optim.Optimizer,
    lessons: Sequence[Lesson],
    rng: np.random.Generator,
) -> None:
    """Go through the spots, or `SPOTS_AN_EPOCH` of them; the spots of a step lie on one slide and share tokens."""
    share = min(1.0, SPOTS_AN_EPOCH / sum(len(lesson.leftover) for lesson in lessons))
    steps = []
    for number, lesson in enumerate(lessons):
        spots = rng.permutation(len(lesson.leftover))[: int(np.ceil(share * len(lesson.leftover)))]
        steps += [(number, some) for some in np.array_split(spots, max(1, round(len(spots) / BATCH)))]
    for at in rng.permutation(len(steps)):
        number, some = steps[at]
        lesson = lessons[number]
        wanted = torch.from_numpy(lesson.leftover[some].astype(np.float32))
        loss = ((lesson.windows.ask(network, lesson.draw(some, rng)) - wanted) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
