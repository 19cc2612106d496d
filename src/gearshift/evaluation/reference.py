"""Statistics of a reference set: what the features of generated images are compared with, and where they came from.

Own files (`save_reference`) hold mean, covariance and a subset of the features for every tap of one extractor, and the
fingerprint of that extractor: loaded under another one they are refused. Published files hold mean and covariance only:

    EDM, pytorch-fid, TTUR   mu [2048], sigma [2048, 2048]
    ADM                      the same, and mu_s [2023], sigma_s [2023, 2023] of the spatial features of sFID

They name neither their network nor the number of images; what they are taken for is written into the provenance.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gearshift.evaluation.moments import moments
from gearshift.runtime import keys
from gearshift.runtime.errors import RunError
from gearshift.runtime.files import atomic_write

if TYPE_CHECKING:
    from gearshift.evaluation.features import FeatureExtractor

FORMAT = 1
KEPT = 10_000
# The only network published statistics of these layouts are made with.
PUBLISHED_NETWORK = "inception_2015_12_05"
_PUBLISHED = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of the features of a reference set, and some of the features themselves.

    Attributes:
        mean: float64 [d], over all images.
        covariance: float64 [d, d], unbiased, over all images.
        count: images; 0 where a published file does not say.
        features: float32 [m, d], a keyed subset (all where there are few) for the metrics that need neighbours or
            kernels; None in published files.
        provenance: extractor, fingerprint, tap, protocol, data, split, digest, source. Without `data` the statistics
            are published ones.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    features: Tensor | None
    provenance: Mapping[str, str]

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.mean.shape[0]

    @classmethod
    def of(
        cls,
        features: Tensor,
        *,
        provenance: Mapping[str, str],
        keep: int = KEPT,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> Statistics:
        """Statistics of `features` [n, d], n >= 2; moments are computed on `device` and kept on the host.

        At most `keep` rows stay, drawn without replacement by `seed` and in their old order. Raises UsageError below
        two rows, RunError where a value is not finite.
        """
        mean, covariance = moments(features, device=device)
        kept = features.detach().to("cpu", torch.float32)
        if len(kept) > keep:
            kept = kept[keys.permutation(seed, "reference_subset", 0, len(kept))[:keep].sort().values]
        return cls(mean.cpu(), covariance.cpu(), len(features), kept, dict(provenance))

    def describe(self) -> str:
        """For protocol strings: "cifar10-train-50000[digest 1234abcd]", or "published: x.npz (...), n unknown"."""
        about = self.provenance
        if "data" not in about:
            number = f"n={self.count}" if self.count else "n unknown"
            return f"published: {about.get('source', 'source unknown')}, {number}"
        name = "-".join(part for part in (about["data"], about.get("split"), str(self.count)) if part)
        return f"{name}[digest {about['digest'][:8]}]" if about.get("digest") else name


def save_reference(path: str | Path, statistics: Mapping[str, Statistics]) -> None:
    """Write the statistics of every tap to one .npz, atomically; folders are made. Raises RunError on a full disk."""
    if not statistics:
        raise ValueError("no statistics to save")
    arrays: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for tap, one in statistics.items():
        arrays[f"{tap}.mean"], arrays[f"{tap}.covariance"] = one.mean.numpy(), one.covariance.numpy()
        if one.features is not None:
            arrays[f"{tap}.features"] = one.features.numpy()
        about[tap] = {"count": one.count, "provenance": dict(one.provenance)}
    meta = json.dumps({"format": FORMAT, "taps": about}, sort_keys=True).encode()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda handle: np.savez(handle, meta=np.frombuffer(meta, dtype=np.uint8), **arrays))


def load_reference(path: str | Path, *, extractor: FeatureExtractor | None = None) -> dict[str, Statistics]:
    """Read what `save_reference` wrote, or a published file, as statistics by tap.

    With an `extractor`, own files must carry its fingerprint and published ones need Inception 2015-12-05. Raises
    RunError, quoting both sides, for another extractor, a broken file, or statistics that cannot be right (shapes,
    values not finite, a covariance that is not symmetric or has a negative variance).
    """
    path = Path(path)
    try:
        # Opened here, because NumPy leaves a broken file open.
        with open(path, "rb") as handle, _archive(handle) as stored:
            found = _own(path, stored) if "meta" in stored.files else _published(path, stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(
            f"{path} is not a file of reference statistics that can be read ({error}); make it again with "
            "`gearshift reference`, or fetch it again"
        ) from error
    if extractor is not None:
        for tap, one in found.items():
            _fits(path, tap, one, extractor)
    return found


def _archive(handle: Any) -> AbstractContextManager[Any]:
    start = handle.read(6)
    handle.seek(0)
    # Of anything else NumPy believes that it is a pickle, and advises to load it unsafely.
    if start[:2] != b"PK" and start != b"\x93NUMPY":
        raise ValueError(f"it begins with {start!r}, which no .npz archive does")
    loaded = np.load(handle, allow_pickle=False)
    if not hasattr(loaded, "files"):
        raise ValueError("one bare array instead of an .npz archive")
    archive: AbstractContextManager[Any] = loaded
    return archive


def _own(path: Path, stored: Any) -> dict[str, Statistics]:
    meta = json.loads(stored["meta"].tobytes())
    if meta["format"] != FORMAT:
        raise RunError(f"{path} has format {meta['format']}, this program reads format {FORMAT}; make it again")
    found = {}
    for tap, about in meta["taps"].items():
        kept = torch.from_numpy(stored[f"{tap}.features"]) if f"{tap}.features" in stored.files else None
        mean, covariance = _checked(path, tap, stored[f"{tap}.mean"], stored[f"{tap}.covariance"])
        if kept is not None and (kept.dim() != 2 or kept.shape[1] != len(mean) or not bool(kept.isfinite().all())):
            raise RunError(
                f"{path}: kept features of '{tap}' have shape {tuple(kept.shape)} beside a mean of width {len(mean)}, "
                "or are not finite; make the file again with `gearshift reference`"
            )
        found[tap] = Statistics(mean, covariance, int(about["count"]), kept, dict(about["provenance"]))
    return found


def _published(path: Path, stored: Any) -> dict[str, Statistics]:
    layout = "ADM layout" if "mu_s" in stored.files else "EDM or pytorch-fid layout"
    found = {}
    for tap, (mu, sigma) in _PUBLISHED.items():
        if mu not in stored.files or sigma not in stored.files:
            continue
        mean, covariance = _checked(path, tap, stored[mu], stored[sigma])
        provenance = {
            "extractor": "assumed inception 2015-12-05",
            "tap": tap,
            "source": f"{path.name} ({layout})",
        }
        if "arr_0" in stored.files:
            provenance["note"] = "the images beside the statistics (arr_0) were not read"
        found[tap] = Statistics(mean, covariance, 0, None, provenance)
    if "features" not in found:
        raise RunError(
            f"{path} holds {', '.join(stored.files) or 'nothing'}; reference statistics are 'mu' and 'sigma' (EDM, "
            "pytorch-fid, ADM) or a file of `gearshift reference`"
        )
    return found


def _checked(path: Path, tap: str, mean: np.ndarray, covariance: np.ndarray) -> tuple[Tensor, Tensor]:
    """Both in float64, the covariance exactly symmetric. Raises RunError for what no set of features can have."""
    m, c = (torch.from_numpy(np.asarray(array, dtype=np.float64)) for array in (mean, covariance))
    wrong = None
    if m.dim() != 1 or c.shape != (len(m), len(m)) or len(m) == 0:
        wrong = f"have shapes {tuple(m.shape)} and {tuple(c.shape)} instead of [d] and [d, d]"
    elif not bool(m.isfinite().all() and c.isfinite().all()):
        wrong = "hold values that are not finite"
    elif float((c - c.T).abs().max()) > 1e-6 * float(c.abs().max()):
        wrong = f"are not symmetric (by {float((c - c.T).abs().max()):.3g})"
    elif float(c.diagonal().min()) < 0:
        wrong = f"have a negative variance ({float(c.diagonal().min()):.3g})"
    if wrong:
        raise RunError(f"{path}: mean and covariance of '{tap}' {wrong}; make the file again, or fetch it again")
    return m, (c + c.T) / 2


def _fits(path: Path, tap: str, statistics: Statistics, extractor: FeatureExtractor) -> None:
    theirs = statistics.provenance.get("fingerprint")
    published = "data" not in statistics.provenance and theirs is None
    if published and extractor.name != PUBLISHED_NETWORK:
        raise RunError(
            f"{path} holds published statistics of {PUBLISHED_NETWORK}, this metric uses {extractor.name}; make a "
            "reference for it with `gearshift reference`"
        )
    if not published and theirs != extractor.fingerprint:
        raise RunError(
            f"{path} was made with {statistics.provenance.get('extractor', 'an unnamed extractor')} (fingerprint "
            f"{theirs}), this metric uses {extractor.name} ({extractor.fingerprint}); make it again with "
            "`gearshift reference`"
        )
    width = extractor.taps.get(tap)
    if width != statistics.dim:
        raise RunError(
            f"{path}: '{tap}' is {statistics.dim} wide, {extractor.name} gives {width if width else 'no such tap'}; "
            "make it again with `gearshift reference`"
        )
