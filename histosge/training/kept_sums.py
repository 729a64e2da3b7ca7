"""The sums that a model was fitted from, kept in its folder, so that further sections can be added to them.

``stats/`` of a model folder holds `DOCUMENT`, ``shared.safetensors`` and one ``group-<n>.safetensors`` for each group of
sections that is left out together. Sums of other sections are added, and the model is solved anew: that is what a training
on all of them gives with the same groups, patterns of genes and weights of the ridges. Nothing of the old sections is read.
"""

import json
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy import sparse

from featurestore.documents import MAX_DOCUMENT_BYTES, DocumentError, convert, parse_json
from featurestore.errors import first_line
from histosge.data.sections import TrainingSection
from histosge.errors import ModelError
from histosge.models.dense import DenseModel
from histosge.models.linear_algebra import Floats
from histosge.models.presets.ridge import RidgeModel
from histosge.models.protocol import SQUARED_ERROR, Model
from histosge.models.ridge_sums import RidgeSums
from histosge.models.scale_differences import ScaleDifferences
from histosge.models.scale_ridges import MAX_GROUPS, ScaleRidges, fit_differences, pool_spots
from histosge.models.target_sums import GeneMoments, TargetBasis, log_library

FOLDER, DOCUMENT, SHARED = "stats", "stats.json", "shared.safetensors"
SPEC_NAME, FORMAT = "histosge-sums", 2
# Sums of the scales alone, of models of earlier versions and of `ridge`: those versions can read them.
FORMAT_OF_SCALES = 1
Arrays = Mapping[str, NDArray[Any]]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class KeptSection(msgspec.Struct, frozen=True):
    """A section whose sums are in a model.

    Parameters
    ----------
    slide_id, slide, expression
        Its id, and fingerprints of its slide and of its expression.
    """

    slide_id: str
    slide: str
    expression: str


class _Document(msgspec.Struct, frozen=True, omit_defaults=True):
    spec: str
    format: int
    preset: str
    dim: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    n_outputs: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    sigmas_um: tuple[float, ...]
    groups: tuple[_Count, ...]
    n_sections: _Count
    sections: tuple[KeptSection, ...]
    n_differences: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 0


@dataclass(frozen=True)
class SumsToKeep:
    """What is written.

    Parameters
    ----------
    preset
        Name of the model.
    sigmas_um
        Of the scales.
    shared
        ``reference``, and for `dense` the patterns of genes and their moments.
    n_sections
        That groups were counted over.
    groups
        Number of each group, with its sums at each scale and those of the differences; made as they are written.
    n_differences
        Inputs of the ridge on the differences of the scales; 0 without it.
    """

    preset: str
    sigmas_um: Sequence[float]
    shared: Arrays
    n_sections: int
    groups: Iterable[tuple[int, Sequence[RidgeSums]]]
    n_differences: int = 0

    def write(self, model: Path, sections: Sequence[KeptSection]) -> None:
        """Write ``stats/`` into a model's folder that is being made."""
        folder, numbers, shape = model / FOLDER, [], (0, 0)
        folder.mkdir()
        try:
            save_file({name: np.ascontiguousarray(a) for name, a in self.shared.items()}, folder / SHARED)
            for number, scales in self.groups:
                arrays = {
                    f"{i}.{name}": np.ascontiguousarray(a)
                    for i, sums in enumerate(scales)
                    for name, a in sums.arrays().items()
                }
                save_file(arrays, folder / f"group-{number}.safetensors")
                numbers.append(number)
                shape = scales[0].xy.shape
        except SafetensorError as error:  # it knows no OSError: a full disk comes as text
            raise ModelError(
                f"cannot write {folder}: {first_line(error)}; make space, or train with --no-stats"
            ) from error
        document = _Document(
            SPEC_NAME,
            FORMAT if self.n_differences else FORMAT_OF_SCALES,
            self.preset,
            *shape,
            tuple(self.sigmas_um),
            tuple(numbers),
            self.n_sections,
            tuple(sections),
            self.n_differences,
        )
        (folder / DOCUMENT).write_text(json.dumps(msgspec.to_builtins(document), indent=2) + "\n")
        # safetensors makes files that only their owner can read; the document has what the umask allows.
        mode = stat.S_IMODE((folder / DOCUMENT).stat().st_mode)
        for file in folder.iterdir():
            file.chmod(mode)


@dataclass(frozen=True)
class KeptSums:
    """Sums in a model's folder; those of groups are read when they are wanted.

    Parameters
    ----------
    folder
        ``stats/``.
    preset, sigmas_um, n_sections, shared
        As of `SumsToKeep`.
    shape
        Numbers of an embedding, and outputs.
    groups
        Numbers of the groups.
    sections
        Whose sums these are.
    n_differences
        As of `SumsToKeep`.
    """

    folder: Path
    preset: str
    sigmas_um: tuple[float, ...]
    n_sections: int
    shared: Arrays
    shape: tuple[int, int]
    groups: tuple[int, ...]
    sections: tuple[KeptSection, ...]
    n_differences: int = 0

    @classmethod
    def open(cls, model: str | Path) -> Self | None:
        """Open the sums of a saved model; None where it has none.

        Raises
        ------
        ModelError
            If they are damaged, or of a newer version.
        """
        folder = Path(model) / FOLDER
        if not folder.is_dir():
            return None
        file = folder / DOCUMENT
        try:
            if file.stat().st_size > MAX_DOCUMENT_BYTES:
                raise ModelError(f"{file} is too large for a document; remove {folder}, or train again")
            found = convert(parse_json(file.read_bytes(), str(file)), _Document, str(file))
        except (OSError, DocumentError) as error:
            raise ModelError(
                f"{folder} cannot be read ({first_line(error)}); remove it, or train again"
            ) from error
        if found.spec != SPEC_NAME or found.format > FORMAT:
            raise ModelError(
                f"{folder} was written by a newer version (format {found.format}, known: {FORMAT}); upgrade with: "
                "pip install -U histosge"
            )
        shape = found.dim, found.n_outputs
        kept = cls(
            folder,
            found.preset,
            found.sigmas_um,
            found.n_sections,
            _read(folder / SHARED),
            shape,
            found.groups,
            found.sections,
            found.n_differences,
        )
        kept._check_length("reference", kept.shared, found.dim)
        return kept

    def sums(self, group: int, scale: int) -> RidgeSums:
        """Read the sums of one group at one scale; after the last scale, those of the differences."""
        file, (dim, n_outputs) = self.folder / f"group-{group}.safetensors", self.shape
        dim = dim if scale < len(self.sigmas_um) else self.n_differences
        arrays = _read(file, [f"{scale}.{name}" for name in ("n", "x", "y", "xx", "xy", "yy")])
        own = {name.partition(".")[2]: np.asarray(array, np.float64) for name, array in arrays.items()}
        shapes = {"x": (dim,), "y": (n_outputs,), "xx": (dim * (dim + 1) // 2,), "xy": (dim, n_outputs)}
        for name, shape in shapes.items():
            if own[name].shape != shape or not np.isfinite(own[name]).all():
                raise ModelError(
                    f"{file}: {name!r} has shape {own[name].shape}, and should have {shape}; train again"
                )
        return RidgeSums.from_arrays(own)

    @property
    def reference(self) -> Floats:
        """Return what was subtracted from all inputs, ``(dim,)``."""
        return np.asarray(self.shared["reference"], np.float64)

    @property
    def lacks_differences(self) -> bool:
        """Whether they are of a `dense` of an earlier version, without the ridge on the differences of the scales."""
        return self.preset == DenseModel.name and not self.n_differences

    @property
    def differences(self) -> ScaleDifferences | None:
        """Return the inputs of the ridge on the differences of the scales; None for sums of the scales alone.

        Raises
        ------
        ModelError
            If their number is another than the sums are of.
        """
        if not self.n_differences:
            return None
        projection = self._shared("projection") if "projection" in self.shared else None
        found = ScaleDifferences(len(self.sigmas_um), self.shape[0], projection)
        is_whole = projection is None or (projection.ndim == 2 and len(projection) == self.shape[0])
        if not is_whole or len(self.sigmas_um) < 2 or found.n_inputs != self.n_differences:
            raise ModelError(
                f"{self.folder}: 'projection' does not go with {self.n_differences} differences of "
                f"{len(self.sigmas_um)} scales; train again"
            )
        return found

    @property
    def moments(self) -> GeneMoments:
        """Return the moments of the genes."""
        n, log = (float(self._shared(name).reshape(())) for name in ("n", "log_library"))
        mean, variance, highest = (self._shared(name) for name in ("mean", "variance", "highest"))
        return GeneMoments(int(n), mean, variance, highest, log)

    @property
    def basis(self) -> TargetBasis:
        """Return the patterns of genes."""
        return TargetBasis(self._shared("columns").astype(np.int64), self._shared("axes"))

    @property
    def loadings(self) -> tuple[Floats, Floats] | None:
        """Return products of genes with patterns and squares of patterns; None where all genes are in the basis."""
        if "loadings" not in self.shared:
            return None
        return self._shared("loadings"), self._shared("squares")

    def _shared(self, name: str) -> Floats:
        if name not in self.shared:
            raise ModelError(f"{self.folder / SHARED} lacks {name!r}; train again")
        return np.asarray(self.shared[name], np.float64)

    def _check_length(self, name: str, arrays: Arrays, length: int) -> None:
        if name not in arrays or arrays[name].shape != (length,):
            raise ModelError(
                f"{self.folder / SHARED}: {name!r} is missing or has another length; train again"
            )

    @property
    def n_bytes(self) -> int:
        """Return what they take on disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir())


def _read(file: Path, names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    try:
        with safe_open(file, "numpy") as stream:
            return {name: stream.get_tensor(name) for name in (names or stream.keys())}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read ({first_line(error)}); train again") from error


def dense_shared(
    reference: Floats,
    basis: TargetBasis,
    moments: GeneMoments,
    loadings: tuple[Floats, Floats] | None,
    differences: ScaleDifferences | None,
) -> dict[str, NDArray[Any]]:
    """Return what `dense` keeps beside the sums of groups."""
    found = {
        "reference": reference,
        "columns": basis.columns,
        "axes": basis.axes,
        "n": np.array([float(moments.n)]),
        "mean": moments.mean,
        "variance": moments.variance,
        "highest": moments.highest,
        "log_library": np.array([moments.log_library]),
    }
    if loadings is not None:
        found |= {"loadings": loadings[0], "squares": loadings[1]}
    if differences is not None and differences.projection is not None:
        found["projection"] = differences.projection
    return found


def sums_in_memory(model: Model, sections: Sequence[TrainingSection], loss: str) -> SumsToKeep | None:
    """Return the sums of sections in memory that a model was fitted to; None for models that do not follow from sums."""
    if loss != SQUARED_ERROR or any(s.stain_pairs is not None or s.library is None for s in sections):
        return None
    reference = sections[0].patches.embedding.mean(axis=0, dtype=np.float64)
    differences: ScaleDifferences | None = None
    if type(model) is DenseModel and isinstance(model.linear, ScaleRidges):
        targets = model.targets
        basis = TargetBasis(np.arange(len(targets.mean)), targets.axes)
        parts = [
            GeneMoments.from_section(sparse.csr_matrix(s.target), np.asarray(s.library)) for s in sections
        ]
        differences = fit_differences(sections)
        shared = dense_shared(reference, basis, GeneMoments.merge(parts), None, differences)
        sigmas_um: tuple[float, ...] = model.linear.sigmas_um
    elif type(model) is RidgeModel:
        shared, sigmas_um, targets = {"reference": reference}, (0.0,), None
    else:
        return None

    def outputs(section: TrainingSection) -> Floats:
        if targets is None:
            return section.target.astype(np.float64)
        log = log_library(np.asarray(section.library))
        return np.column_stack([targets.to_patterns(section), log - log.mean()])

    def groups() -> Iterable[tuple[int, list[RidgeSums]]]:
        for number in range(min(MAX_GROUPS, len(sections))):
            own = sections[number::MAX_GROUPS]
            n_outputs = outputs(own[0]).shape[1]
            scales = [RidgeSums.zeros(len(reference), n_outputs) for _ in sigmas_um]
            if differences is not None:
                scales.append(RidgeSums.zeros(differences.n_inputs, n_outputs))
            for section in own:
                scales = _add_section(scales, section, outputs(section), sigmas_um, reference, differences)
            yield number, scales

    n_differences = 0 if differences is None else differences.n_inputs
    return SumsToKeep(type(model).name, sigmas_um, shared, len(sections), groups(), n_differences)


def _add_section(
    sums: Sequence[RidgeSums],
    section: TrainingSection,
    outputs: Floats,
    sigmas_um: Sequence[float],
    reference: Floats,
    differences: ScaleDifferences | None,
) -> list[RidgeSums]:
    """Add a section to the sums of each scale and, with `differences`, to those of the differences."""
    found = list[RidgeSums]()
    inputs = np.empty((len(outputs), 0 if differences is None else differences.n_inputs))
    for i, sigma_um in enumerate(sigmas_um):
        pooled = pool_spots(section, sigma_um) - reference
        found.append(sums[i].add_rows(pooled, outputs))
        if differences is not None:
            differences.add_scale(inputs, i, pooled)
    if differences is not None:
        found.append(sums[-1].add_rows(inputs, outputs))
    return found
