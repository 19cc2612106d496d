"""The tiny pipelines run, repeat themselves, and are called the way their table says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .tiny import CASES, Case, clip_tokenizer, liven, texts, with_scheduler

SCHEDULERS = ("ddim", "euler", "dpmpp")


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def batches(case: Case, pipe: Any, **call: Any) -> list[tuple[str, int]]:
    """Runs the pipeline and returns, for each call of a denoiser, its name and the size of the batch."""
    seen: list[tuple[str, int]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sample: Tensor = args[0] if args else kwargs["hidden_states"]
            seen.append((name, len(sample)))

        return getattr(pipe, name).register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(name) for name in case.denoisers]
    case.run(pipe, **call)
    for handle in handles:
        handle.remove()
    return seen


def test_seeds_decide(case: Case) -> None:
    pipe = case.build()
    first = case.run(pipe)
    assert first.isfinite().all()
    assert first.std() > 0.01
    assert torch.equal(first, case.run(pipe))
    assert torch.equal(first, case.run(case.build()))
    assert not torch.equal(first, case.run(pipe, seed=1))


def test_the_number_of_prompts_the_size_and_the_guidance_can_be_chosen(case: Case) -> None:
    pipe = case.build()
    one = case.run(pipe, steps=3)
    two = case.run(pipe, steps=3, prompts=2)
    assert two.isfinite().all()
    assert two.shape == (2, *one.shape[1:])
    assert not torch.equal(two[0], two[1])
    large = case.run(pipe, steps=3, size=case.sizes[1])
    assert large.isfinite().all()
    assert large.shape != one.shape
    assert torch.equal(one, case.run(pipe, steps=3))
    plain = case.run(pipe, steps=3, guidance=1.0)
    assert plain.isfinite().all()
    # The only pipeline without guidance of any kind.
    assert torch.equal(plain, one) == (case.name == "ddim")


def test_denoisers_are_called_as_the_table_says(case: Case) -> None:
    pipe = case.build()
    steps = 5 if case.name == "sd_img2img" else 4
    guided = batches(case, pipe, steps=steps, prompts=2)
    plain = batches(case, pipe, steps=steps, prompts=2, guidance=1.0)
    assert {name for name, _ in guided} == set(case.denoisers)
    assert len(plain) == 4
    assert all(batch == 2 for _, batch in plain)
    assert len(guided) == (8 if case.sequential else 4)
    assert all(batch == (4 if case.guided and not case.sequential else 2) for _, batch in guided)
    for name in (*case.denoisers, *case.helpers):
        assert not getattr(pipe, name).training


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.callback])
def test_callbacks_are_called_after_every_step(name: str) -> None:
    seen: list[int] = []

    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    CASES[name].run(CASES[name].build(), callback_on_step_end=callback)
    assert seen == list(range(4 if name == "sd_img2img" else 6))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.callback])
def test_some_pipelines_know_no_callbacks(name: str) -> None:
    case = CASES[name]
    if name in ("ldm", "pixart"):
        # They swallow keywords that they do not know.
        case.run(case.build(), steps=2, callback_on_step_end=pytest.fail)
    else:
        with pytest.raises(TypeError, match="callback_on_step_end"):
            case.run(case.build(), steps=2, callback_on_step_end=pytest.fail)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.epsilon])
def test_schedulers_can_be_exchanged(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    results = [case.run(with_scheduler(pipe, scheduler), steps=4) for scheduler in SCHEDULERS]
    assert all(result.isfinite().all() for result in results)
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["svd", "wan", "flux"])
def test_other_predictions_keep_their_scheduler(name: str) -> None:
    with pytest.raises(ValueError, match="does not predict noise"):
        with_scheduler(CASES[name].build(), "ddim")


def test_stable_diffusion_comes_back_from_a_folder(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    pipe = CASES["sd"].build()
    pipe.save_pretrained(tmp_path)
    expected = pipe(prompt="a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt")
    for kind in (DiffusionPipeline, StableDiffusionPipeline):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is StableDiffusionPipeline
        loaded.set_progress_bar_config(disable=True)
        found = loaded(
            prompt="a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt"
        )
        assert torch.equal(found.images, expected.images)
    assert expected.images.std() > 0.01


def test_prompts_differ_within_the_length_of_the_tokenizer() -> None:
    tokenizer = clip_tokenizer()
    prompts = texts(9)
    assert len(set(prompts)) == 9
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    assert tokens.shape == (9, 16)
    assert len({tuple(row.tolist()) for row in tokens}) == 9
    assert len(tokenizer("".join(prompts[3])).input_ids) <= 16


def test_liven_leaves_nothing_without_effect() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[1].weight)
    kept = model[0].weight.clone()
    assert liven(model) is model
    assert torch.equal(model[0].weight, kept)
    assert all(parameter.any() for parameter in model.parameters())
