"""The devnet's folder: its lock, its layout, its configurations."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.devnet import Devnet, DevnetOptions
from shoal.client.devnet_files import (
    DEFAULT_FOLDER,
    DevnetFolder,
    RunningDevnet,
    find_running,
    worker_profile,
    write_toml,
)
from shoal.protocol.errors import InvalidRequest, Unavailable


def running(pid: int) -> RunningDevnet:
    return RunningDevnet(
        pid=pid,
        api_url="http://127.0.0.1:1",
        rpc_url="http://127.0.0.1:2",
        p2p_addresses=("/ip4/127.0.0.1/tcp/3/p2p/x",),
        requester_key=Path("/keys/requester.json"),
    )


def test_two_cannot_run_the_same_devnet(tmp_path: Path) -> None:
    with (
        DevnetFolder(tmp_path / "d").locked(),
        pytest.raises(Unavailable, match="already runs"),
        DevnetFolder(tmp_path / "d").locked(),
    ):
        pass
    with DevnetFolder(tmp_path / "d").locked():
        pass


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "devnet.json").write_text(json.dumps({"layout": 99}))
    with pytest.raises(InvalidRequest, match="layout 99"), DevnetFolder(tmp_path).locked():
        pass


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="not a devnet's"), DevnetFolder(tmp_path).locked():
        pass
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_running_devnet_is_found_from_folders_below(tmp_path: Path) -> None:
    folder = DevnetFolder(tmp_path / DEFAULT_FOLDER)
    with folder.locked():
        folder.announce(running(os.getpid()))
        below = tmp_path / "a/b"
        below.mkdir(parents=True)
        assert find_running(below) == running(os.getpid())
    assert find_running(tmp_path) is None


def test_a_killed_devnet_is_not_found(tmp_path: Path) -> None:
    folder = DevnetFolder(tmp_path / DEFAULT_FOLDER)
    folder.root.mkdir(parents=True)
    folder.announce(running(2**22 + 1))
    assert folder.running() is None


def test_three_workers_differ_in_price_and_speed() -> None:
    profiles = [worker_profile(index) for index in range(3)]
    for field in ("name", "rollout_price", "gradient_price", "niceness"):
        assert len({getattr(profile, field) for profile in profiles}) == 3


def test_given_workers_take_the_place_of_the_usual_ones(tmp_path: Path) -> None:
    site = replace(worker_profile(0), name="site", tables={"ray": {"actors": 2}})
    assert Devnet(DevnetOptions(data_dir=tmp_path, profiles=(site,))).profiles == (site,)
    with pytest.raises(InvalidRequest, match="33 workers"):
        Devnet(DevnetOptions(data_dir=tmp_path, profiles=(site,) * 33))


@pytest.mark.parametrize("count", [-1, 33])
def test_an_absurd_number_of_workers_is_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(InvalidRequest, match="workers"):
        Devnet(DevnetOptions(data_dir=tmp_path, num_workers=count))


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.one_of(st.booleans(), st.integers(-(2**53), 2**53), st.text(max_size=30)),
        max_size=6,
    )
)
def test_what_is_written_as_toml_reads_back(values: dict[str, object]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.toml"
        write_toml(path, values | {"table": {"a": 1}})
        assert tomllib.loads(path.read_text(encoding="utf-8")) == values | {"table": {"a": 1}}
