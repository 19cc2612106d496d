"""The papers' tables follow one schema, and what they launch exists."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from gearshift.runtime.paths import conf_dir

ROOT = Path(__file__).parents[1]
TABLES = sorted((ROOT / "experiments").rglob("*.yaml"))


def test_there_are_tables():
    assert len(TABLES) >= 2


@pytest.mark.parametrize("file", TABLES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_a_table_follows_the_schema(file):
    table = OmegaConf.to_container(OmegaConf.load(file))
    assert set(table) == {"paper", "table", "protocol", "rows"}
    for row in table["rows"]:
        assert set(row) == {"name", "overrides", "published", "measured"}
        for figure in row["published"].values():
            assert set(figure) == {"value", "status", "source"}
            assert figure["status"] in ("verified", "summary", "recalled", "unknown")
            assert (figure["value"] is None) == (figure["status"] == "unknown"), "an unknown figure has no value"
            assert figure["status"] != "verified" or figure["source"]
        if row["measured"]:
            assert (ROOT / row["measured"]).is_file()
        if row["overrides"]:
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                compose("train", overrides=row["overrides"])
