"""A network of three stages that is small enough to look into."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gearshift.backbones.base import Backbone
from gearshift.backbones.staging import StageRouter
from gearshift.execution.stream import Rows, Stream

PUBLISHED = (2.5103, 7.6577)
"""Of the released EDM code of arXiv 2312.09181."""
SIDE = 4


class Layer(nn.Module):
    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inp, out)

    def forward(self, hidden: Tensor, cond: dict[str, Tensor], skip: Tensor | None, slot: object) -> Tensor:
        out: Tensor = torch.tanh(self.linear(hidden)) + cond["time"][:, :1]
        return out


class Staircase(Backbone):
    """Block 0 is shared; stage k goes on with a block of its own, of its own width, and reads out by itself."""

    def __init__(self, boundaries: tuple[float, ...] = PUBLISHED, labels: bool = False, variance: bool = False) -> None:
        super().__init__()
        generator_state = torch.get_rng_state()
        torch.manual_seed(0)
        self.router = StageRouter(boundaries)
        self.boundaries = self.router.boundaries
        stages = self.router.num_stages
        widths = [12, 8, 4][:stages]
        self.in_channels, self.out_channels, self.image_size = 1, 2 if variance else 1, SIDE
        self.cond_kind, self.num_classes = ("class", 3) if labels else ("none", None)
        self.inlet = nn.Linear(SIDE * SIDE, 6)
        self.labels = nn.Embedding(4, 6) if labels else None
        self.blocks = nn.ModuleList([Layer(6, 10), *(Layer(10, width) for width in widths)])
        self.heads = nn.ModuleList(nn.Linear(width, self.out_channels * SIDE * SIDE) for width in widths)
        self.paths = tuple((0, 1 + k) for k in range(stages))
        torch.set_rng_state(generator_state)

    def embed(self, x: Tensor, time: Tensor, cond: Tensor | None) -> Stream:
        hidden = self.inlet(x.flatten(1))
        if self.labels is not None:
            hidden = hidden + self.labels(cond)
        return Stream(hidden, time, Rows(len(x)), {"time": torch.sin(time)[:, None]})

    def readout(self, hidden: Tensor, cond: dict[str, Tensor], depth: int, path: int = 0) -> Tensor:
        out: Tensor = self.heads[path](hidden)
        return out.reshape(-1, self.out_channels, SIDE, SIDE)

    def route(self, log_snr: Tensor) -> Tensor:
        return self.router.route(log_snr)

    def null_cond(self, num_rows: int, device: torch.device) -> Tensor | None:
        return torch.full((num_rows,), 3, device=device) if self.labels is not None else None

    def of_stage(self, stage: int) -> list[nn.Parameter]:
        return [*self.blocks[1 + stage].parameters(), *self.heads[stage].parameters()]
