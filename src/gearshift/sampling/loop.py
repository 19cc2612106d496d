"""The sampling loop: it sees a denoiser, a solver and a policy, and nothing of any one method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gearshift.backbones.base import check_text
from gearshift.diffusion.denoiser import Denoiser, Prediction
from gearshift.diffusion.solvers.base import Call, Solver
from gearshift.execution.cost import CostTable
from gearshift.execution.memory import Key
from gearshift.execution.outputs import PACK, Packing
from gearshift.policies.base import Policy, RunInfo
from gearshift.runtime import keys
from gearshift.runtime.errors import UsageError
from gearshift.sampling.ledger import Ledger, LedgerData
from gearshift.sampling.prompts import Prompts
from gearshift.sampling.stepping import Stepper, worth_storing

LABELS = ("uniform", "balanced")


@dataclass(frozen=True)
class Sampler:
    """Everything that fixes the images of an index: weights, solver, policy, seed, labels, guidance.

    Images depend on their index alone: at one chunk size bit for bit, between chunk sizes up to kernel rounding.

    Attributes:
        chunk: images per pass; recorded in every protocol.
        guidance: w, 1 = off.
        labels: "uniform" (keyed draw per image), "balanced" (index modulo classes), or one class for all.
        dtype: of the network's products; x and the solver stay in fp32.
        packing: real packing, or simulation.
        guidance_channels: guide the first so many channels (3 of 4 in the official DiT); None guides all.
        guidance_interval: least and greatest log-SNR of a call that is guided; the others run the conditional branch
            alone. None guides every call.
        prompts: of networks that take text, instead of labels.
    """

    denoiser: Denoiser
    solver: Solver
    policy: Policy
    seed: int = 0
    chunk: int = 256
    guidance: float = 1.0
    labels: str | int = "uniform"
    dtype: torch.dtype = torch.float32
    packing: Packing = PACK
    guidance_channels: int | None = None
    guidance_interval: tuple[float, float] | None = None
    prompts: Prompts | None = None

    def check(self) -> None:
        """Raises UsageError where solver, policy, guidance or labels do not fit the network."""
        network = self.denoiser.network
        if self.chunk < 1:
            raise UsageError(f"chunk={self.chunk} images per pass; it must be at least 1")
        self.solver.check(self.denoiser.process)
        self.policy.check(self.info(self.calls()))
        if self.branches == 2:
            network.null_cond(1, self.device)
        if self.guidance_channels is not None and not 1 <= self.guidance_channels <= network.in_channels:
            raise UsageError(
                f"guidance_channels={self.guidance_channels} is outside 1..{network.in_channels}, the channels of "
                f"{network.name}; null guides them all"
            )
        if self.guidance_interval is not None and not self.guidance_interval[0] < self.guidance_interval[1]:
            raise UsageError(
                f"guidance_interval={list(self.guidance_interval)} is empty; give the least log-SNR that is guided, "
                "then the greatest"
            )
        if self.prompts is not None:
            check_text(network, self.prompts.shape, "prompts")
        if network.cond_kind == "class":
            check_labels(self.labels, network.num_classes or 0, network.name)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def branches(self) -> int:
        return self.denoiser.num_branches(self.guidance)

    def calls(self) -> tuple[Call, ...]:
        return self.solver.calls(self.denoiser.process)

    def info(self, calls: tuple[Call, ...], index: Tensor | None = None) -> RunInfo:
        """What a policy is told of a run over the images `index`; None is a whole chunk."""
        batch = self.chunk if index is None else len(index)
        return RunInfo(calls, self.denoiser.network, batch, self.branches, self.solver.sigma_frame, self.device.type)

    def cond(self, index: Tensor) -> Tensor | None:
        """Conditioning of images `index` (int64 [B]): labels [B], text [B, L, D], or None."""
        network = self.denoiser.network
        if network.cond_kind == "none":
            return None
        if self.prompts is not None:
            return self.prompts.cond(index)
        if network.cond_kind != "class" or network.num_classes is None:
            raise UsageError(
                f"{network.name} takes {network.cond_kind} conditioning; pass it as cond= (or as prompts=)"
            )
        return labels_of(self.labels, self.seed, index, network.num_classes)

    def cost_table(self) -> CostTable:
        """Costs of the network."""
        return CostTable.measure(self.denoiser.network)

    def stepper(self, index: Tensor, keys: frozenset[Key]) -> Stepper:
        """Takes the images `index` through schedules that may take `keys` from memory."""
        return Stepper(self, index, self.cond(index), keys, keep_earlier=True)

    def generate(
        self,
        index: Tensor,
        table: CostTable,
        *,
        cond: Tensor | None = None,
        on_call: Callable[[Call], None] | None = None,
        on_prediction: Callable[[Call, Prediction], None] | None = None,
    ) -> Chunk:
        """`sample_chunk` of these images."""
        return sample_chunk(self, index, table, cond=cond, on_call=on_call, on_prediction=on_prediction)

    def chunks(self, start: int, stop: int) -> list[Tensor]:
        """Chunks of one size that hold the image indices start..stop-1; the first and the last may reach beyond.

        They start at multiples of the size, so an image has the same neighbours whatever range it is asked for in.
        """
        return chunks_of(self.chunk, start, stop, self.device)


def check_labels(labels: str | int, classes: int, name: str) -> None:
    """Raises UsageError where labels are neither a way to draw them nor one of the classes of the network `name`."""
    if isinstance(labels, str) and labels not in LABELS:
        raise UsageError(f"labels={labels!r} is neither one of {list(LABELS)} nor a class 0..{classes - 1}")
    if isinstance(labels, int) and not 0 <= labels < classes:
        raise UsageError(f"label {labels} is outside the classes 0..{classes - 1} of {name}")


def labels_of(labels: str | int, seed: int, index: Tensor, classes: int) -> Tensor:
    """Labels int64 [B] of the images `index`."""
    if isinstance(labels, int):
        return torch.full_like(index, labels)
    return index % classes if labels == "balanced" else keys.integers(seed, "sample_label", index, 0, classes)


def chunks_of(size: int, start: int, stop: int, device: torch.device) -> list[Tensor]:
    """Chunks of `size` indices, at its multiples, that hold start..stop-1."""
    firsts = range(start - start % size, stop, size) if start < stop else ()
    return [torch.arange(first, first + size, device=device) for first in firsts]


@dataclass(frozen=True)
class Chunk:
    """Images [n, C, H, W] fp32 in [-1, 1] (not clipped), their indices, conditioning and ledger, and what the policy
    has to say of its decisions (`Policy.record`)."""

    index: Tensor
    images: Tensor
    cond: Tensor | None
    ledger: LedgerData
    record: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """Images uint8 [n, C, H, W], labels int64 [n] or None, and the ledger of what they took."""

    images: Tensor
    labels: Tensor | None
    ledger: LedgerData


@torch.inference_mode()
def sample_chunk(
    sampler: Sampler,
    index: Tensor,
    table: CostTable,
    *,
    cond: Tensor | None = None,
    on_call: Callable[[Call], None] | None = None,
    on_prediction: Callable[[Call, Prediction], None] | None = None,
) -> Chunk:
    """Images of `index` (int64 [B]); `cond` replaces the sampler's own labels.

    `on_call` is told each call when it is done, `on_prediction` also what was predicted, on the device.
    """
    solver, policy = sampler.solver, sampler.policy
    network = sampler.denoiser.network
    cond = sampler.cond(index) if cond is None else cond
    calls = sampler.calls()
    info = sampler.info(calls, index)
    state = policy.begin(info)
    plans = [policy.plan(state, call) for call in calls] if policy.static else None
    stepper = Stepper(sampler, index, cond, policy.memory_keys(info), policy.forecasts)
    store = None if plans is None or not stepper.reusable else worth_storing(info, plans)
    levels = torch.tensor([call.log_snr for call in calls], dtype=torch.float64)
    full_macs = [table.full(network, path).macs for path in network.route(levels).tolist()]
    ledger = Ledger(table, full_macs, info.branches, info.batch)
    point = stepper.begin()
    for call in calls:
        plan = policy.plan(state, call) if plans is None else plans[call.position]
        point, x, prediction = stepper.step(point, call, plan, None if store is None else store[call.position])
        if not policy.static:
            state = policy.observe(state, call, x, solver.result(point.solved), prediction)
        if point.memory is not None and store is not None:
            point.memory.drop(stepper.reusable - store[call.position])
        ledger.record(call, prediction, 0 if point.memory is None else point.memory.num_bytes)
        if on_prediction is not None:
            on_prediction(call, prediction)
        if on_call is not None:
            on_call(call)
    return Chunk(index, solver.result(point.solved), cond, ledger.close(), policy.record(state))


def sample(
    sampler: Sampler,
    num_images: int,
    *,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    table: CostTable | None = None,
    on_call: Callable[[Call], None] | None = None,
) -> Iterator[Chunk]:
    """Chunks of images start..start+num_images-1 that fall to this rank, trimmed to the range, in order.

    The cut into chunks is the same for every number of ranks, so the images are too.
    """
    sampler.check()
    table = sampler.cost_table() if table is None else table
    stop = start + num_images
    for index in sampler.chunks(start, stop)[rank::world_size]:
        chunk = sampler.generate(index, table, on_call=on_call)
        first = int(index[0])
        kept = slice(max(start - first, 0), min(sampler.chunk, stop - first))
        cond = None if chunk.cond is None else chunk.cond[kept]
        # What is said of every sample has them along its last axis, after the calls.
        record = {
            name: value[..., kept] if value.ndim > 1 and value.shape[-1] == len(index) else value
            for name, value in chunk.record.items()
        }
        yield Chunk(index[kept], chunk.images[kept], cond, chunk.ledger.take(kept), record)
