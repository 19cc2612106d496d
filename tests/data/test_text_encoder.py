"""CLIP text features, from a tiny model with random weights."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gearshift.data.text_encoder import DEFAULT, VARIABLE, TextEncoder, locate_text_encoder
from gearshift.runtime.errors import RunError, UsageError

from ..captioned import LENGTH, WIDTH, save_text_encoder

TEXTS = ["a red square", "", "a blue square that is far too long"]


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_text_encoder(tmp_path_factory.mktemp("text") / "clip")


def test_features_are_the_last_hidden_states_of_padded_tokens(folder):
    from transformers import CLIPTextModel, CLIPTokenizer

    ours = TextEncoder.load(str(folder))
    assert (ours.length, ours.width) == (LENGTH, WIDTH)
    tokens = ours.tokens(TEXTS)
    theirs = CLIPTokenizer.from_pretrained(folder)
    begin, end = theirs.bos_token_id, theirs.eos_token_id
    assert tokens.shape == (3, LENGTH) and tokens.dtype == torch.int64
    assert tokens[1].tolist() == [begin] + [end] * (LENGTH - 1), "the empty string is begin, end and padding"
    assert tokens[2, 0] == begin and tokens[2, -1] == end, "what is too long loses its end, not the end token"
    # As the embedder of latent diffusion calls it: no mask, the last layer norm included.
    model = CLIPTextModel.from_pretrained(folder).eval()
    made = theirs(TEXTS, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=made["input_ids"]).last_hidden_state
    features = ours.features(tokens)
    assert features.shape == (3, LENGTH, WIDTH) and features.dtype == torch.float32
    torch.testing.assert_close(features, expected)
    # Causal: the first token knows nothing of what follows; padding is no text and does differ by its place.
    torch.testing.assert_close(features[:, 0], features[:1, 0].expand(3, -1))
    assert not torch.allclose(features[1, 1], features[1, 2])
    assert ours.tokens([]).shape == (0, LENGTH)


def test_the_fingerprint_is_of_weights_and_tokenizer(folder, tmp_path):
    first = TextEncoder.load(str(folder)).fingerprint
    whole = save_text_encoder(tmp_path / "whole", whole=True)
    assert TextEncoder.load(str(whole)).fingerprint == first, "the image half of a whole CLIP does not matter"
    assert TextEncoder.load(str(save_text_encoder(tmp_path / "other", seed=1))).fingerprint != first
    heads = save_text_encoder(tmp_path / "heads", num_attention_heads=4)
    assert TextEncoder.load(str(heads)).fingerprint != first
    words = tmp_path / "words"
    shutil.copytree(folder, words)
    (words / "merges.txt").write_text("#version: 0.2\na r\n")
    changed = TextEncoder.load(str(words))
    assert changed.fingerprint != first and not changed.tokens(["red"]).equal(
        TextEncoder.load(str(folder)).tokens(["red"])
    )
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    state = load_file(half / "model.safetensors")
    save_file({name: value.half() for name, value in state.items()}, half / "model.safetensors", {"format": "pt"})
    rounded = TextEncoder.load(str(half))
    assert rounded.fingerprint != first and rounded.features(rounded.tokens(["red"])).dtype == torch.float32


def test_it_is_found_by_name_variable_and_cache(folder, monkeypatch):
    assert locate_text_encoder(str(folder)) == (str(folder.resolve()), folder)
    monkeypatch.setenv(VARIABLE, str(folder))
    assert locate_text_encoder() == (str(folder.resolve()), folder)
    monkeypatch.delenv(VARIABLE)
    asked = []

    def cached(repository, name):
        asked.append(repository)
        return str(folder / name) if (folder / name).is_file() else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert locate_text_encoder() == (DEFAULT, folder) and set(asked) == {DEFAULT}
    assert locate_text_encoder("some/clip") == ("some/clip", folder)


def test_what_is_absent_is_said_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, name: None)
    with pytest.raises(
        UsageError, match=rf"text_encoder=null \(no {VARIABLE}.*hf download {DEFAULT}.*{VARIABLE}=FOLDER"
    ):
        locate_text_encoder()
    with pytest.raises(UsageError, match=r"some/clip is neither a folder .*hf download some/clip"):
        locate_text_encoder("some/clip")
    with pytest.raises(UsageError, match=r"/nowhere is not a folder; name a folder with config\.json"):
        locate_text_encoder("/nowhere")
    with pytest.raises(UsageError, match=r"has no config\.json and no model\.safetensors and no tokenizer\.json or"):
        locate_text_encoder(str(tmp_path))
    monkeypatch.setenv(VARIABLE, "/nowhere")
    with pytest.raises(UsageError, match=f"{VARIABLE}=/nowhere is not a folder"):
        locate_text_encoder()


def test_without_transformers_it_is_said_how_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'gearshift\[text\]'"):
        TextEncoder.load(str(folder))


def test_files_that_do_not_fit_are_refused(folder, tmp_path):
    def copy(name):
        shutil.copytree(folder, tmp_path / name)
        return tmp_path / name

    other = copy("kind")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(UsageError, match=r"describes t5, and text features are those of CLIP"):
        TextEncoder.load(str(other))
    (other / "config.json").write_text("{")
    with pytest.raises(RunError, match="is not readable"):
        TextEncoder.load(str(other))
    broken = copy("broken")
    (broken / "model.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match=r"does not make a CLIP text encoder.*fetch it again"):
        TextEncoder.load(str(broken))
    lacking = copy("lacking")
    state = load_file(lacking / "model.safetensors")
    name = next(name for name in sorted(state) if name.endswith("final_layer_norm.weight"))
    save_file({k: v for k, v in state.items() if k != name}, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"1 weights are missing or of another shape, e\.g\. .*final_layer_norm"):
        TextEncoder.load(str(lacking))
    wordy = copy("wordy")
    vocabulary = json.loads((wordy / "vocab.json").read_text())
    (wordy / "vocab.json").write_text(json.dumps({**vocabulary, "more": len(vocabulary)}))
    with pytest.raises(RunError, match=r"has 86 words and the network knows 85"):
        TextEncoder.load(str(wordy))
