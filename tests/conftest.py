"""What holds for every test: nothing comes from the network, from a cluster or from the display of this machine."""

import os

import pytest

# Read when the libraries are imported, hence before anything else, and inherited by the processes that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", MPLBACKEND="Agg"
)

_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GEARSHIFT_DEBUG", "HYDRA_FULL_ERROR")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test run inside a cluster job or under a launcher is not one of its processes."""
    for name in list(os.environ):
        if name in _FOREIGN or name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
