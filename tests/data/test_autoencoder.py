import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gearshift.data.autoencoder import CONFIG, VARIABLE, WEIGHTS, Autoencoder, decode, locate_autoencoder
from gearshift.data.pixels import to_pm1, to_u8
from gearshift.runtime.errors import RunError, UsageError


@pytest.fixture(autouse=True)
def nothing_found_by_itself(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def theirs(autoencoder_folder):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(autoencoder_folder, low_cpu_mem_usage=False).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_moments_and_images_are_those_of_diffusers(autoencoder_folder, theirs, images):
    ours = Autoencoder.load(str(autoencoder_folder))
    with torch.no_grad():
        posterior = theirs.encode(to_pm1(images)).latent_dist
        latents = posterior.mean * 0.18215
        expected = theirs.decode(latents / 0.18215).sample
    moments = ours.encode(images)
    assert moments.shape == (5, 8, 8, 8) and moments.dtype == torch.float32
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.logvar], 1))
    assert (ours.scale, ours.factor, ours.latent_channels, ours.latent_size(16)) == (0.18215, 2, 4, 8)
    torch.testing.assert_close(ours.decode(latents), expected)


def test_decoding_in_chunks_is_decoding_each_chunk(autoencoder_folder):
    ours = Autoencoder.load(str(autoencoder_folder))
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    found = decode(latents, ours, chunk=2)
    assert found.dtype == torch.uint8 and found.shape == (5, 3, 16, 16)
    pieces = [to_u8(ours.decode(latents[at : at + 2])) for at in (0, 2, 4)]
    assert torch.equal(found, torch.cat(pieces))
    # Which other chunks there are changes nothing: a process that has only these two latents gets the same bits.
    assert torch.equal(decode(latents[2:4], ours, chunk=2), found[2:4])
    assert len(found.unique()) > 2


def test_grey_images_go_to_all_channels(autoencoder_folder, images):
    ours = Autoencoder.load(str(autoencoder_folder))
    grey = images[:, :1]
    assert torch.equal(ours.encode(grey), ours.encode(grey.expand(-1, 3, -1, -1)))


def test_macs_of_decoding(autoencoder_folder, theirs):
    ours = Autoencoder.load(str(autoencoder_folder))
    macs = 0

    def count(layer, inputs, output):
        nonlocal macs
        macs += output.numel() * layer.weight[0].numel()

    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    parts = [layer for layer in theirs.modules() if isinstance(layer, kinds)]
    hooks = [layer.register_forward_hook(count) for layer in parts]
    with torch.no_grad():
        theirs.decode(torch.zeros(1, 4, 8, 8))
    for hook in hooks:
        hook.remove()
    attention = 2 * 64 * 64 * 8  # 64 places attend to 64 places, in 8 channels, twice
    assert ours.decode_macs(8) == macs + attention


def test_the_order_of_places(autoencoder_folder, new_autoencoder, monkeypatch, tmp_path):
    other = new_autoencoder(tmp_path / "other", seed=1)
    monkeypatch.setenv(VARIABLE, str(other))
    assert locate_autoencoder(None)[1] == other
    assert locate_autoencoder(str(autoencoder_folder))[1] == autoencoder_folder


def test_the_cache_of_the_hub(autoencoder_folder, tmp_path):
    import huggingface_hub

    snapshot = tmp_path / "hub" / "models--stabilityai--sd-vae-ft-mse" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = tmp_path / "hub" / "models--stabilityai--sd-vae-ft-mse" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).write_bytes((autoencoder_folder / name).read_bytes())
    assert str(tmp_path / "hub") == huggingface_hub.constants.HF_HUB_CACHE
    for named in ("sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"):
        assert locate_autoencoder(named) == ("sd-vae-ft-mse", snapshot)
    assert Autoencoder.load("sd-vae-ft-mse").name == "sd-vae-ft-mse"
    with pytest.raises(UsageError, match="autoencoder=sd-vae-ft-ema is not in the cache"):
        locate_autoencoder("sd-vae-ft-ema")


def test_what_is_missing_is_said_with_the_line_that_fetches_it(tmp_path, monkeypatch):
    line = f"hf download stabilityai/sd-vae-ft-ema {CONFIG} {WEIGHTS}"
    with pytest.raises(UsageError, match=line):
        locate_autoencoder(None)
    with pytest.raises(UsageError, match=f"nowhere is not a folder.*{line}"):
        locate_autoencoder(str(tmp_path / "nowhere"))
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(UsageError, match=f"has no {WEIGHTS};"):
        locate_autoencoder(str(tmp_path))
    monkeypatch.setenv(VARIABLE, "/nowhere")
    with pytest.raises(UsageError, match=f"{VARIABLE}=/nowhere is not a folder"):
        locate_autoencoder(None)


def test_old_names_of_attention_weights_are_read(autoencoder_folder, tmp_path, images):
    """The released files of Stable Diffusion have them."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(autoencoder_folder / WEIGHTS)
    renamed = {}
    for name, value in state.items():
        for new, before in old.items():
            name = name.replace(new, before)
        renamed[name] = value
    assert renamed.keys() != state.keys()
    save_file(renamed, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_bytes((autoencoder_folder / CONFIG).read_bytes())
    ours, theirs = Autoencoder.load(str(tmp_path)), Autoencoder.load(str(autoencoder_folder))
    assert (ours.encoder, ours.decoder) == (theirs.encoder, theirs.decoder)
    assert torch.equal(ours.encode(images), theirs.encode(images))


def test_files_that_do_not_make_an_autoencoder(autoencoder_folder, tmp_path):
    state = load_file(autoencoder_folder / WEIGHTS)
    (tmp_path / CONFIG).write_bytes((autoencoder_folder / CONFIG).read_bytes())
    save_file({k: v for k, v in state.items() if k != "decoder.conv_in.weight"}, tmp_path / WEIGHTS)
    with pytest.raises(RunError, match=r"1 weights are missing or foreign, e\.g\. decoder\.conv_in\.weight"):
        Autoencoder.load(str(tmp_path))
    (tmp_path / WEIGHTS).write_bytes(b"half a file")
    with pytest.raises(RunError, match="is damaged"):
        Autoencoder.load(str(tmp_path))
    (tmp_path / CONFIG).write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(UsageError, match="describes UNet2DModel"):
        Autoencoder.load(str(tmp_path))
    (tmp_path / CONFIG).write_text("no json")
    with pytest.raises(RunError, match="not readable"):
        Autoencoder.load(str(tmp_path))


def test_a_shift_is_refused(new_autoencoder, tmp_path):
    with pytest.raises(UsageError, match="shifts its latents"):
        Autoencoder.load(str(new_autoencoder(tmp_path, shift_factor=0.1)))


def test_sizes_that_do_not_divide(autoencoder_folder):
    with pytest.raises(UsageError, match="15 pixels"):
        Autoencoder.load(str(autoencoder_folder)).latent_size(15)


def test_halves_have_fingerprints_of_their_own(autoencoder_folder, tmp_path):
    """A decoder that was tuned further still decodes the latents of the encoder they share."""
    state = load_file(autoencoder_folder / WEIGHTS)
    state["decoder.conv_out.bias"] = state["decoder.conv_out.bias"] + 1
    save_file(state, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_bytes((autoencoder_folder / CONFIG).read_bytes())
    tuned, first = Autoencoder.load(str(tmp_path)), Autoencoder.load(str(autoencoder_folder))
    assert tuned.encoder == first.encoder and tuned.decoder != first.decoder
    half = Autoencoder.load(str(autoencoder_folder), dtype=torch.bfloat16)
    assert (half.encoder, half.decoder) == (first.encoder, first.decoder)
