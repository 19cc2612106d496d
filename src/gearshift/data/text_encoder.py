"""Text features of CLIP: captions to the last hidden states [L, D] that text-conditional U-ViTs are fed.

As in latent diffusion (arXiv 2112.10752) and U-ViT (arXiv 2209.12152): the text is cut or padded to the positions of
the model, without a mask, and what comes out of the last layer norm is the condition; 77 x 768 for CLIP ViT-L/14.
Weights are looked for in a folder that was named, in the folder that $GEARSHIFT_TEXT_ENCODER names, or in the cache of
the Hugging Face hub, and never fetched: what is missing is said with the line that fetches it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.runtime.errors import RunError, UsageError

VARIABLE = "GEARSHIFT_TEXT_ENCODER"
DEFAULT = "openai/clip-vit-large-patch14"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Files that make a tokenizer: all those of one entry."""
_KINDS = ("clip", "clip_text_model")
# What tokenizing it tells besides the vocabulary: case, accents, spaces, numbers, signs.
_PROBE = "A  Photo of two\tCAFÉS, 1234 — it's   lowercase?!"


def locate_text_encoder(named: str | None = None) -> tuple[str, Path]:
    """What to call it and the folder with its files. `named` is a folder or an id of the hub (looked up in its cache);
    None is $GEARSHIFT_TEXT_ENCODER, and then CLIP ViT-L/14.

    Raises UsageError saying what is missing and how to fetch it.
    """
    variable = os.environ.get(VARIABLE)
    said = f"text_encoder={named}"
    if named is None and variable:
        named, said = variable, f"{VARIABLE}={variable}"
    elif named is None:
        named, said = DEFAULT, f"text_encoder=null (no {VARIABLE}, so {DEFAULT})"
    folder = Path(named).expanduser()
    wanted = f"name a folder with {CONFIG}, {WEIGHTS} and tokenizer.json (text_encoder=FOLDER or {VARIABLE}=FOLDER)"
    if folder.is_dir():
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
            missing.append(" or ".join(" with ".join(names) for names in TOKENIZERS))
        if missing:
            raise UsageError(f"{said} has no {' and no '.join(missing)}; {wanted}, or fetch {DEFAULT}: `{_fetch()}`")
        return str(folder.resolve()), folder
    if named.count("/") != 1 or named.startswith((".", "/", "~")):
        raise UsageError(f"{said} is not a folder; {wanted}, or fetch {DEFAULT}: `{_fetch()}`")
    found = _cached(named)
    if found is None:
        raise UsageError(
            f"{said} is neither a folder nor in the cache of the hub; fetch it with `{_fetch(named)}`, or {wanted}"
        )
    return named, found


class TextEncoder:
    """CLIP's text half with its tokenizer.

    Attributes:
        name: a folder or an id of the hub.
        length: L, tokens of every text.
        width: D, features of every token.
        fingerprint: 16 hex digits over weights, how they are built, and tokenizer.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, name: str, *, device: torch.device | str = "cpu") -> None:
        """`network` is a CLIPTextModel; it computes in float32 whatever it is stored in."""
        config: Any = network.config
        self.name = name
        self.length, self.width = int(config.max_position_embeddings), int(config.hidden_size)
        self._tokenizer = tokenizer
        self._network: Any = nn.Module.to(network, device=device, dtype=torch.float32).eval().requires_grad_(False)
        self.fingerprint = _fingerprint(self._network, tokenizer, self.tokens([_PROBE]))

    @classmethod
    def load(cls, named: str | None = None, *, device: torch.device | str = "cpu") -> TextEncoder:
        """The text encoder `named` as in `locate_text_encoder`.

        Raises UsageError when it or `transformers` cannot be found, and RunError when its files do not fit each other.
        """
        name, folder = locate_text_encoder(named)
        network, tokenizer = _read(folder)
        return cls(network, tokenizer, name, device=device)

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self._network.parameters()).device
        return found

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """int64 [n, L]: begin, the text, end and padding; a text that is too long loses its end."""
        if not texts:
            return torch.empty(0, self.length, dtype=torch.int64)
        made = self._tokenizer(list(texts), truncation=True, max_length=self.length, padding="max_length")
        return torch.tensor(made["input_ids"], dtype=torch.int64)

    def features(self, tokens: Tensor) -> Tensor:
        """int64 [n, L] -> float32 [n, L, D], the last hidden states."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            states: Tensor = self._network(input_ids=tokens.to(self.device)).last_hidden_state
        return states.float()


def _fetch(repository: str = DEFAULT) -> str:
    return f"hf download {repository} {CONFIG} {WEIGHTS} tokenizer.json tokenizer_config.json vocab.json merges.txt"


def _cached(repository: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    def there(name: str) -> bool:
        # A file known to be absent is a marker object and one never asked for is None.
        return isinstance(try_to_load_from_cache(repository, name), str)

    if not (there(CONFIG) and there(WEIGHTS) and any(all(map(there, names)) for names in TOKENIZERS)):
        return None
    return Path(str(try_to_load_from_cache(repository, WEIGHTS))).parent


def _read(folder: Path) -> tuple[nn.Module, Any]:
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise UsageError(
            f"text features need the package transformers ({error}); install it with `pip install 'gearshift[text]'`"
        ) from error
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{folder / CONFIG} is not readable ({error}); fetch it again") from error
    if kind not in _KINDS:
        raise UsageError(f"{folder / CONFIG} describes {kind}, and text features are those of CLIP; use {DEFAULT}")
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what it would say of missing weights is refused below, in one line
    logging.disable_progress_bar()
    try:
        pretrained: Any = CLIPTextModel.from_pretrained
        network, found = pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # safetensors, tokenizers, transformers and torch have no common base for a bad file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{folder} does not make a CLIP text encoder ({reason}); fetch it again") from error
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
    # Of a whole CLIP the image half is left over, and that is as it should be.
    odd = [*found["missing_keys"], *map(str, found["mismatched_keys"])]
    if odd:
        raise RunError(
            f"{folder / WEIGHTS} does not fit {CONFIG}: {len(odd)} weights are missing or of another shape, e.g. "
            f"{sorted(odd)[0]}; fetch both again"
        )
    if len(tokenizer) > network.config.vocab_size:
        raise RunError(
            f"the tokenizer in {folder} has {len(tokenizer)} words and the network knows {network.config.vocab_size}; "
            "fetch both again"
        )
    return network, tokenizer


def _fingerprint(network: nn.Module, tokenizer: Any, probe: Tensor) -> str:
    config: Any = network.config
    built = {key: getattr(config, key) for key in ("num_attention_heads", "hidden_act", "layer_norm_eps")}
    words = sorted(tokenizer.get_vocab().items())
    stored = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in stored]
    digest = hashlib.sha256(json.dumps([built, words, merges, probe.tolist()], sort_keys=True).encode())
    # Whether the names begin with it depends on the version of transformers.
    state = {name.removeprefix("text_model."): value for name, value in network.state_dict().items()}
    for name, value in sorted(state.items()):
        if name.endswith("position_ids"):
            continue
        digest.update(f"{name}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
