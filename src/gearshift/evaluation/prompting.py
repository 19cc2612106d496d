"""From what a user names as prompts to texts with their features: texts, a file, or an encoded data set's captions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from gearshift.backbones.base import Backbone, check_text
from gearshift.backbones.null_context import NullContext
from gearshift.data.latent_files import MANIFEST
from gearshift.data.latents import Latents, LatentsConfig
from gearshift.data.text_encoder import VARIABLE, TextEncoder
from gearshift.evaluation.batches import in_batches
from gearshift.runtime import config
from gearshift.runtime.errors import RunError, UsageError
from gearshift.sampling.prompts import Prompts, read_prompts

DATA = "data"
# Texts per pass through the encoder.
_BATCH = 32


def find_prompts(
    network: Backbone, folder: Path, named: str | os.PathLike[str] | Sequence[str], cfg: DictConfig
) -> Prompts:
    """Prompts for a run whose network, folder and configuration these are; `named` as in `LoadedRun.prompts`.

    A network that was imported without the features of the empty string gets them here, from the encoder that reads the
    texts. Raises UsageError and RunError as there.
    """
    if network.cond_kind != "text":
        raise UsageError(f"{folder} takes no text (cond_kind={network.cond_kind}), and prompts were given")
    null = NullContext.load(folder)
    if not isinstance(named, (str, os.PathLike)):
        return _read_texts(network, null, list(named), "a list of texts")
    if str(named) == DATA:
        node = cfg.get("data")
        data = config.build(node) if node else None
        if not isinstance(data, Latents) or data.text_shape is None:
            raise UsageError(f"prompts=data, and {folder} has no data with captions; give prompts=FILE or a FOLDER")
        return _of_latents(network, null, data, f"data.path={data.config.path}")
    path = Path(named).expanduser()
    if (path / MANIFEST).is_file():
        return _of_latents(network, null, Latents(LatentsConfig(path=str(path), flip=False)), f"prompts={named}")
    if not path.is_file():
        raise UsageError(
            f"prompts={named} is no file with a prompt per line, no folder of gearshift encode, and not 'data'"
        )
    return _read_texts(network, null, read_prompts(path), path.name)


def _read_texts(network: Backbone, null: NullContext | None, texts: list[str], origin: str) -> Prompts:
    if not texts:
        raise UsageError(f"prompts: {origin} holds no prompt; write one per line")
    device = next(network.parameters()).device
    # The encoder may lie elsewhere now than when the captions were read; which one it is, its fingerprint says.
    recorded = None if null is None or os.environ.get(VARIABLE) else null.encoder
    encoder = TextEncoder.load(recorded, device=device)
    check_text(network, (encoder.length, encoder.width), f"text encoder {encoder.name}")
    _check_same(null, encoder.fingerprint, f"text encoder {encoder.name}")
    if null is None:
        network.set_null_context(encoder.features(encoder.tokens([""]))[0])
    features = in_batches(lambda tokens: encoder.features(tokens).cpu(), [encoder.tokens(texts)], _BATCH, device)
    return Prompts.of(texts, features, origin, encoder.fingerprint)


def _of_latents(network: Backbone, null: NullContext | None, data: Latents, said: str) -> Prompts:
    check_text(network, data.text_shape, said)
    manifest = data.manifest
    assert manifest.text is not None
    _check_same(null, manifest.text["fingerprint"], said)
    if null is None:
        network.set_null_context(data.null_text())
    rows = data.load(manifest.data["split"]).text
    assert rows is not None
    first = [texts[0] for texts in data.captions()]
    origin = f"the first captions of {manifest.data['name']} {manifest.data['split']}"
    return Prompts(first, manifest.digest[:16], origin, rows)


def _check_same(null: NullContext | None, fingerprint: str, said: str) -> None:
    if null is not None and null.fingerprint != fingerprint:
        raise RunError(
            f"{said} has fingerprint {fingerprint}, and the run was trained on text features of {null.encoder} with "
            f"fingerprint {null.fingerprint}; name that one by {VARIABLE}=FOLDER, or encode with it"
        )
