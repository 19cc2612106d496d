"""Blocks compiled one by one: the same numbers, the same names, and nothing compiled again after the warm-up."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.diffusion.denoiser import Denoiser
from gearshift.diffusion.process import Discrete, DiscreteConfig
from gearshift.diffusion.solvers.ddim import DDIM, DDIMConfig
from gearshift.execution.compiling import GRAPHS, compile_blocks
from gearshift.execution.cost import CostTable
from gearshift.execution.executor import execute
from gearshift.execution.memory import Memory
from gearshift.execution.plan import StepPlan
from gearshift.policies import ExitSchedule
from gearshift.runtime.errors import UsageError
from gearshift.sampling.loop import Sampler, sample_chunk

from ..contract import build, example

pytestmark = [
    # Compilers import what warns about itself.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
NAMES = ["dit-class", "uvit-class"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    import torch._dynamo as dynamo
    import torch._dynamo.config as settings
    from torch._dynamo.utils import counters

    limit = settings.recompile_limit
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()
    settings.recompile_limit = limit


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and guarded as they always are, and then run by torch: no compiler is needed."""
    compiling: Callable[..., None] = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, mode=None: compiling(module, backend="eager"))


def graphs() -> int:
    from torch._dynamo.utils import counters

    assert not counters["graph_break"], dict(counters["graph_break"])
    return int(counters["stats"]["unique_graphs"])


def pair(name: str) -> tuple[Backbone, Backbone]:
    """A network and a compiled copy."""
    plain = copy.deepcopy(build(name))
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in compiled.named_modules()] == [n for n, _ in plain.named_modules()]
    return plain, compiled


def prediction(backbone: Backbone, rows: int, plan: StepPlan, memory: Memory | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = backbone.image_size
    x = torch.randn(rows, backbone.in_channels, size, size, generator=generator)
    time = torch.rand(rows, generator=generator) * 900
    cond = example(backbone, rows, generator, torch.float32)
    return execute(backbone, backbone.embed(x, time, cond), plan, memory).prediction


def shrinking(backbone: Backbone, rows: int) -> StepPlan:
    """All depths, the deepest first."""
    exits = torch.tensor(backbone.exits())
    return StepPlan(depth=exits[torch.arange(rows) * len(exits) // rows].flip(0))


def agrees(plain: Backbone, compiled: Backbone, rows: int, plan: StepPlan, learn: bool) -> None:
    """Outputs, and where it learns gradients."""
    results = []
    for network in (plain, compiled):
        network.requires_grad_(learn).zero_grad()
        with torch.set_grad_enabled(learn):
            output = prediction(network, rows, plan)
        if learn:
            output.square().mean().backward()
        results.append((output.detach(), [p.grad for p in network.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for expected, actual in zip(results[0][1], results[1][1], strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("learn", [True, False])
def test_shrinking_rows_compile_nothing_after_the_warm_up(traced: None, name: str, learn: bool) -> None:
    plain, compiled = pair(name)
    for rows in (16, 9, 1):  # the warm-up: every block with two sizes that are not one, and with one
        agrees(plain, compiled, rows, StepPlan(), learn)
    warm = graphs()
    assert 0 < warm <= GRAPHS
    for rows in (16, 2, 3, 7, 1, 12, 31, 8):
        agrees(plain, compiled, rows, shrinking(plain, rows), learn)
    assert graphs() == warm


def test_blocks_of_one_class_share_a_graph(traced: None) -> None:
    _, compiled = pair("dit-class")
    with torch.no_grad():
        prediction(compiled, 6, StepPlan())
    assert graphs() <= 2 < len(compiled.blocks)  # two: the first block gets patches in another layout


@pytest.mark.parametrize("part", ["qk", "map", "output", "block"])
def test_reuse_compiles_once_per_kind_of_call(traced: None, part: str) -> None:
    """Slots with entries of earlier calls trace too."""
    plain, compiled = pair("dit-class")
    keys = [(block, part) for block in (1, 2)]
    counted = []
    memories = [Memory(6, keys) for _ in range(2)]
    for number in range(6):
        plan = StepPlan(reuse=frozenset(keys)) if number % 2 else StepPlan()
        outputs = []
        for network, memory in zip((plain, compiled), memories, strict=True):
            memory.begin_call()
            with torch.no_grad():
                outputs.append(prediction(network, 6, plan, memory, seed=number))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
        counted.append(graphs())
    assert counted[1] == counted[-1]


def test_a_static_schedule_samples_the_same_and_compiles_nothing_after_its_first_calls(traced: None) -> None:
    plain, compiled = pair("dit-class")
    process = Discrete(DiscreteConfig())
    policy = ExitSchedule(depths=[4, 3, 2, 2])
    counted: list[int] = []
    images = []
    for network in (plain, compiled):
        table = CostTable.measure(network)  # measured on a copy that is not compiled
        sampler = Sampler(Denoiser(network, process), DDIM(DDIMConfig(steps=8)), policy, chunk=4, guidance=2.0)
        chunk = sample_chunk(sampler, torch.arange(4), table, on_call=lambda _call: counted.append(graphs()))
        images.append(chunk.images)
    torch.testing.assert_close(images[1], images[0], rtol=1e-4, atol=1e-4)
    assert counted[:8] == [0] * 8 and counted[8] > 0
    assert counted[8] == counted[-1]  # all blocks above the first are one graph, so deeper calls bring none


def test_the_limit_of_the_compiler_is_raised_and_never_lowered() -> None:
    import torch._dynamo.config as settings

    settings.recompile_limit = 8
    compile_blocks(copy.deepcopy(build("isotropic")))
    assert settings.recompile_limit == GRAPHS
    settings.recompile_limit = 1000
    compile_blocks(copy.deepcopy(build("isotropic")))
    assert settings.recompile_limit == 1000


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(UsageError, match="compile mode 'fast' is not one of"):
        compile_blocks(build("isotropic"), mode="fast")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("learn", [True, False])
def test_compiled_for_the_cpu_is_the_same(learn: bool) -> None:
    """The real compiler; few sizes, because each graph takes it seconds."""
    plain, compiled = pair("dit-class")
    for rows in (8, 5, 1):
        agrees(plain, compiled, rows, StepPlan(), learn)
    warm = graphs()
    for rows in (8, 6, 7, 5):
        agrees(plain, compiled, rows, shrinking(plain, rows), learn)
    assert graphs() == warm


def test_a_loaded_run_samples_compiled(traced: None) -> None:
    from gearshift.api import LoadedRun

    run: Any = LoadedRun(None, None, Denoiser(copy.deepcopy(build("dit-class")), Discrete(DiscreteConfig())))  # type: ignore[arg-type]
    assert run.compile() is run
    sampler = run.sampler(ExitSchedule(depths=[4, 2]), DDIM(DDIMConfig(steps=2)), chunk=2)
    sample_chunk(sampler, torch.arange(2), CostTable.measure(sampler.denoiser.network))
    assert graphs() > 0


def test_a_copy_is_not_compiled(traced: None) -> None:
    """Whoever copies a network (cost tables, exit heads) gets plain blocks."""
    _, compiled = pair("dit-class")
    twin: Any = copy.deepcopy(compiled)
    with torch.no_grad():
        prediction(twin, 3, StepPlan())
    assert graphs() == 0
