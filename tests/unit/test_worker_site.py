"""What of a site needs no Ray: its settings, its actors, its bases, and who is refused."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worker_double import BASE, BASE_FILES

from shoal.protocol.errors import InvalidRequest, PeerFault, Unavailable
from shoal.rl.ray_guard import (
    find_token,
    make_temp_dir,
    require_own_cluster,
    require_unexposed,
    stranger_environment,
)
from shoal.rl.site import Actor, count_actors
from shoal.worker.__main__ import build_parser, read_options
from shoal.worker.base_copies import BaseCopies
from shoal.worker.config import MAX_CAPACITY, WorkerConfig, load_config
from shoal.worker.site import open_engine

ADDRESS = "http://127.0.0.1:8700"
CLUSTER = "10.0.0.1:6379"


def config(**options: object) -> WorkerConfig:
    return load_config(None, {}, {"orchestrator": ADDRESS, **options})


# --- settings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "address"),
    [([ADDRESS], None), ([ADDRESS, "--ray"], "local"), ([ADDRESS, "--ray", CLUSTER], CLUSTER)],
)
def test_the_option_takes_an_address_or_none(line: list[str], address: str | None) -> None:
    options = read_options(build_parser().parse_args(line))
    assert load_config(None, {}, options).ray.address == address


def test_the_site_is_set_in_the_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(f'orchestrator = "{ADDRESS}"\n[ray]\naddress = "{CLUSTER}"\nactors = 4\n')
    loaded = load_config(file, {"SHOAL_WORKER_RAY_GPUS_PER_ACTOR": "0.5"}, {})
    assert (loaded.ray.address, loaded.ray.actors, loaded.ray.gpus_per_actor) == (CLUSTER, 4, 0.5)
    with pytest.raises(InvalidRequest, match=r"did you mean 'ray\.actors'"):
        config(**{"ray.actor": 4})


def test_capacity_that_was_not_set_grows_with_the_actors() -> None:
    grown = config(**{"capacity.rollout": 10}).with_actors(4).capacity
    assert (grown.rollout, grown.gradient, grown.evaluate) == (10, 384, 2048)
    assert config().with_actors(1 << 20).capacity.evaluate == MAX_CAPACITY


def test_without_ray_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "shoal.rl.ray_site", raising=False)
    with pytest.raises(InvalidRequest, match=r"shoal\[site\]") as caught:
        open_engine(config(**{"ray.address": "local"}))
    assert caught.value.code == "no_ray"


def test_a_worker_without_a_site_imports_neither_ray_nor_torch() -> None:
    code = (
        "import shoal.worker.site, shoal.rl.split, shoal.rl.ray_guard, sys;"
        "sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the actor's side ---------------------------------------------------------------------


class Stepper:
    """Steps when it is told to."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)

    def run(self, on_progress: Callable[[], None], steps: int) -> int:
        for _ in range(steps):
            self.go.acquire()
            on_progress()
        return steps


def started() -> tuple[Actor, Stepper]:
    stepper = Stepper()
    actor = Actor(lambda: stepper)
    assert actor.ready(lambda: "node")[:2] == ("node", os.getpid())
    return actor, stepper


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Unavailable as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def test_an_actor_tells_each_step_as_it_is_made() -> None:
    actor, stepper = started()
    thread, found = in_thread(lambda: actor.run(7, 2))
    stepper.go.release()
    assert actor.watch(7, 0) == 1
    stepper.go.release()
    assert actor.watch(7, 1) == 2
    thread.join()
    assert found == [2]


def test_a_part_is_stopped_at_its_next_step_and_no_other_with_it() -> None:
    actor, stepper = started()
    stepper.go.release(3)
    actor.stop(7)
    thread, found = in_thread(lambda: actor.run(7, 2))
    thread.join()
    assert isinstance(found[0], Unavailable)
    assert actor.run(8, 2) == 2


def test_actors_are_counted_where_all_they_need_is_left() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0}, {"CPU": 1.0, "GPU": 4.0}]
    assert count_actors(nodes, 1, 0) == 12
    assert count_actors(nodes, 2, 0) == 5
    assert count_actors(nodes, 1, 1) == 3
    assert count_actors(nodes, 1, 0.5) == 5
    assert count_actors(nodes, 16, 0) == 0
    assert count_actors([{"CPU": 0.3}], 0.1, 0) == 3


# --- bases on other nodes -----------------------------------------------------------------


@pytest.fixture
def copies(tmp_path: Path) -> BaseCopies:
    return BaseCopies(tmp_path / "bases")


def send(copies: BaseCopies, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        for start in range(0, len(data), 3):
            copies.take_chunk(BASE, path, data[start : start + 3])
    copies.finish_base(BASE)


def test_a_base_arrives_in_chunks(copies: BaseCopies, tmp_path: Path) -> None:
    assert not copies.has_base(BASE)
    send(copies, BASE_FILES)
    assert copies.has_base(BASE)
    (folder,) = (tmp_path / "bases").iterdir()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == BASE_FILES
    # Another actor of the node, which has not seen it come, finds it whole.
    assert BaseCopies(tmp_path / "bases").has_base(BASE)


def test_a_base_that_arrives_damaged_is_refused_and_leaves_nothing(
    copies: BaseCopies, tmp_path: Path
) -> None:
    with pytest.raises(PeerFault, match="arrived damaged") as caught:
        send(copies, {**BASE_FILES, "model.safetensors": b"weightz"})
    assert caught.value.code == "wrong_base"
    assert list((tmp_path / "bases").iterdir()) == []
    assert not copies.has_base(BASE)


def test_a_copy_that_was_damaged_on_disk_is_removed(copies: BaseCopies, tmp_path: Path) -> None:
    send(copies, BASE_FILES)
    (folder,) = (tmp_path / "bases").iterdir()
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert not BaseCopies(tmp_path / "bases").has_base(BASE)
    assert not folder.exists()
    assert not copies.has_base(BASE)


def test_the_copies_used_last_are_kept(copies: BaseCopies, tmp_path: Path) -> None:
    folders = [tmp_path / "bases" / f"{number}" for number in range(5)]
    folders.append(tmp_path / "bases" / "incoming-of-an-actor-long-dead")
    for age, folder in enumerate(folders):
        folder.mkdir(parents=True)
        os.utime(folder, (1_000_000 - age, 1_000_000 - age))
    (tmp_path / "bases" / "incoming-of-another-actor").mkdir()
    send(copies, BASE_FILES)
    assert {path.name for path in (tmp_path / "bases").iterdir()} == {
        "0",
        "1",
        "2",
        "incoming-of-another-actor",
        BASE.content_digest(),
    }


# --- who is refused -----------------------------------------------------------------------


def test_a_token_is_found_where_ray_looks_for_it(tmp_path: Path) -> None:
    assert not find_token({}, tmp_path)
    assert find_token({"RAY_AUTH_TOKEN": "secret"}, tmp_path)
    assert not find_token({"RAY_AUTH_TOKEN": ""}, tmp_path)
    named = tmp_path / "token"
    assert not find_token({"RAY_AUTH_TOKEN_PATH": str(named)}, tmp_path)
    named.write_text("secret")
    assert find_token({"RAY_AUTH_TOKEN_PATH": str(named)}, tmp_path)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert find_token({}, tmp_path)


def test_an_exposed_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    private = ["127.0.0.1", "10.1.2.3", "192.168.0.7", "100.64.0.9", "fd00::1"]
    require_unexposed(CLUSTER, "", private)
    with pytest.raises(InvalidRequest, match="serves a dashboard at"):
        require_unexposed(CLUSTER, "10.0.0.1:8265", private)
    with pytest.raises(InvalidRequest, match=r"public address 8\.8\.8\.8"):
        require_unexposed(CLUSTER, "", [*private, "8.8.8.8"])
    monkeypatch.setenv("RAY_USE_TLS", "1")
    require_unexposed(CLUSTER, "", [*private, "8.8.8.8"])


def test_a_stranger_has_all_that_the_worker_has_but_the_token() -> None:
    """Without the TLS settings a cluster that uses TLS would seem to be none."""
    tls = {"RAY_USE_TLS": "1", "RAY_TLS_CA_CERT": "/ca", "RAY_TLS_SERVER_KEY": "/key"}
    token = {"RAY_AUTH_TOKEN": "secret", "RAY_AUTH_TOKEN_PATH": "/token", "RAY_AUTH_MODE": "token"}
    assert stranger_environment({"PATH": "/bin", **tls, **token}) == {
        "PATH": "/bin",
        **tls,
        "RAY_AUTH_MODE": "disabled",
    }


@pytest.mark.parametrize(
    "address", ["", "host", "host:", "host:\u00b2", "host:70000", f"host:{'9' * 20}", "a/b:1"]
)
def test_what_is_no_address_of_a_cluster_is_said_to_be_none(address: str) -> None:
    with pytest.raises(InvalidRequest, match="is no Ray address") as refused:
        require_own_cluster(address)
    assert refused.value.code == "ray_address"


def test_rays_sockets_never_lie_too_deep(tmp_path: Path) -> None:
    near = Path("/tmp") / f"shoal-{secrets.token_hex(4)}"
    short, deep = make_temp_dir(near), make_temp_dir(tmp_path / ("x" * 60))
    assert short == near / "ray"
    for folder in (short, deep):
        assert folder.is_dir()
        assert folder.stat().st_mode & 0o77 == 0
        assert len(str(folder)) <= 103 - len("/session_2026-01-01_00-00-00_000000_1/sockets/raylet")
        folder.rmdir()
    near.rmdir()
    assert not deep.is_relative_to(tmp_path)
