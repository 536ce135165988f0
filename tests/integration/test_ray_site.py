"""A Ray site: a real cluster of two nodes on this machine, and what it is refused for."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from learning_fixtures import Lab, write_base
from site_runners import Doubler, Unstartable
from site_story import (
    assert_same_gradient,
    assert_same_rows,
    evaluate_task,
    gradient_task,
    inputs_of,
    rollout_task,
)

from shoal.protocol.errors import InvalidRequest, PeerFault, Unauthorised, Unavailable
from shoal.protocol.learning import GradientSpec
from shoal.rl.ray_guard import require_guarded, require_own_cluster
from shoal.rl.ray_site import Member, RaySite, open_site
from shoal.rl.site import SiteShape
from shoal.worker.config import Device, WorkerConfig, load_config
from shoal.worker.engine import PolicyEngine
from shoal.worker.site import SiteEngine

# After our module, which sets what Ray reads when it is imported.
import ray  # isort: skip
import ray.cluster_utils  # isort: skip
import ray.experimental.internal_kv as ray_kv  # isort: skip

TESTS = Path(__file__).parent.parent
TOKEN = secrets.token_hex(32)
STORE_BYTES = 80 << 20
FEW_CPUS, MANY_CPUS = 12, 64
"""Declared, not used: every test's actors find room beside those of the tests before."""
QUICK_DEATHS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Pytest's own folders are too deep for the sockets Ray puts there.
    path = Path("/tmp") / f"shoal-test-{secrets.token_hex(4)}"
    (path / "ray").mkdir(parents=True)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Any]:
    """Two nodes, with GPUs they only declare; the second has more CPUs than the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.setenv("RAY_TMPDIR", str(folder))
        cluster: Any = ray.cluster_utils.Cluster()
        common: dict[str, Any] = {
            "num_gpus": 3,
            "object_store_memory": STORE_BYTES,
            "include_log_monitor": False,
            "no_monitor": True,
        }
        cluster.add_node(
            **common, num_cpus=FEW_CPUS, include_dashboard=False, _system_config=QUICK_DEATHS
        )
        cluster.add_node(**common, num_cpus=MANY_CPUS)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def site(cluster: Any, folder: Path) -> Iterator[RaySite]:
    """The site through which this process is connected; its actors run `Doubler`."""
    shape = SiteShape(num_actors=2, gpus_per_actor=0.0)
    # In a thread, as a worker does: in the main one Ray would take over SIGTERM.
    with ThreadPoolExecutor(1) as thread:
        site = thread.submit(open_site, cluster.address, shape, folder).result()
    site.start(Doubler)
    yield site
    site.close()


def one_more(shape: SiteShape, gpus: float = 0.0) -> RaySite:
    """Another two actors, over the connection that is there."""
    return RaySite(shape, 2, gpus, None)


def nothing_given(member: Member) -> tuple[()]:
    return ()


def ignore() -> None:
    pass


# --- the pool -----------------------------------------------------------------------------


def test_outputs_come_in_order_and_every_step_is_told(site: RaySite) -> None:
    steps: list[None] = []
    calls = [("double", number) for number in range(7)]
    outputs = site.run(calls, nothing_given, lambda: steps.append(None))
    assert outputs == [0, 2, 4, 6, 8, 10, 12]
    assert len(steps) >= len(calls)
    # Ray's own default of 15 makes a site on a busy machine many times slower.
    assert site.run([("tell niceness", 0)], nothing_given, ignore) == [os.nice(0)]


def test_a_runners_error_arrives_as_itself(site: RaySite) -> None:
    with pytest.raises(PeerFault, match=r"The part is bad\.") as caught:
        site.run([("double", 1), ("fail", "0" * 64)], nothing_given, ignore)
    assert caught.value.code == "malformed"
    assert site.run([("double", 1)], nothing_given, ignore) == [2]


def test_the_part_of_a_dead_actor_is_done_by_another(site: RaySite, tmp_path: Path) -> None:
    before = {member.pid for member in site.members}
    calls = [("die once", str(tmp_path / "mark")), ("double", 4), ("double", 5)]
    assert site.run(calls, nothing_given, ignore) == ["alive", 8, 10]
    site.run([("double", 1)] * 8, nothing_given, ignore)
    assert {member.pid for member in site.members} != before


def test_a_part_that_kills_every_actor_is_given_up(site: RaySite) -> None:
    with pytest.raises(Unavailable, match="3 died over the same part") as caught:
        site.run([("die", 0), ("double", 1)], nothing_given, ignore)
    assert caught.value.code == "site_lost"
    assert site.run([("double", 1)], nothing_given, ignore) == [2]


def test_what_the_caller_raises_stops_every_part(site: RaySite) -> None:
    def stop() -> None:
        raise Unavailable("The lease is gone.", code="lease_dropped")

    with pytest.raises(Unavailable, match="The lease is gone"):
        site.run([("step for ever", 0)] * 2, nothing_given, stop)
    # Were the parts still running, these would wait behind them for ever.
    assert site.run([("double", 1)] * 4, nothing_given, ignore) == [2] * 4


def test_actors_that_never_start_are_reported_with_their_reason(site: RaySite) -> None:
    reasons: list[str] = []
    other = one_more(SiteShape())
    other.start(Unstartable, reasons.append)
    with pytest.raises(Unavailable, match="no such device"):
        other.wait_ready()
    assert all("no such device" in reason for reason in reasons)
    assert len(reasons) >= 3


# --- the engine ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.open(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def alone() -> PolicyEngine:
    engine = PolicyEngine(Device.CPU, 1)
    engine.prepare()
    return engine


def config_of(folder: Path, **changes: object) -> WorkerConfig:
    options = {"orchestrator": "http://127.0.0.1:1", "device": "cpu", "data_dir": folder / "data"}
    return load_config(None, {}, {**options, "ray.cache_dir": folder / "bases", **changes})


@pytest.fixture(scope="module")
def pool(site: RaySite) -> RaySite:
    """One actor on each node: two GPUs each of the three its node declares."""
    return one_more(SiteShape(), gpus=2.0)


@pytest.fixture(scope="module")
def engine(pool: RaySite, folder: Path) -> SiteEngine:
    engine = SiteEngine(pool, config_of(folder))
    engine.prepare()
    pool.wait_ready(2)
    return engine


def test_actors_are_placed_by_what_they_declare(engine: SiteEngine, pool: RaySite) -> None:
    assert len({member.node_id for member in pool.members}) == 2
    heavy = one_more(SiteShape(cpus_per_actor=FEW_CPUS + 1))
    heavy.start(Doubler)
    heavy.wait_ready(2)
    (node,) = {member.node_id for member in heavy.members}
    assert node != pool.node_id


def test_a_site_computes_what_one_process_does(
    engine: SiteEngine, alone: PolicyEngine, lab: Lab, folder: Path
) -> None:
    steps: list[None] = []
    for task in (rollout_task(lab), evaluate_task(lab, 0.0), evaluate_task(lab, 1.0)):
        ours = engine.run(task, inputs_of(lab), lambda: steps.append(None))
        theirs = alone.run(task, inputs_of(lab), ignore)
        assert_same_rows(ours.payload, theirs.payload)
        assert (ours.num_tokens, ours.policy_sha256) == (theirs.num_tokens, theirs.policy_sha256)
        assert (ours.engine, ours.dtype) == (theirs.engine, theirs.dtype)
    gradient, data = gradient_task(lab, GradientSpec())
    ours = engine.run(gradient, inputs_of(lab, data), lambda: steps.append(None))
    theirs = alone.run(gradient, inputs_of(lab, data), ignore)
    assert_same_gradient(ours.payload, theirs.payload)
    assert ours.num_tokens == theirs.num_tokens
    assert len(steps) >= 8
    # The second node got the base through Ray, whole.
    copy = folder / "bases" / lab.plan.base.content_digest()
    for file in lab.plan.base.files:
        assert (copy / file.path).read_bytes() == (lab.folder / file.path).read_bytes()
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_an_actor_killed_at_work_changes_nothing(
    engine: SiteEngine, pool: RaySite, alone: PolicyEngine, lab: Lab
) -> None:
    (victim,) = [member for member in pool.members if member.node_id == pool.node_id]
    # Stopped before it is given its part, so that it surely holds one when it dies.
    os.kill(victim.pid, signal.SIGSTOP)

    killed: list[None] = []

    def kill() -> None:
        if not killed:
            killed.append(None)
            os.kill(victim.pid, signal.SIGKILL)

    task = rollout_task(lab)
    ours = engine.run(task, inputs_of(lab), kill)
    assert_same_rows(ours.payload, alone.run(task, inputs_of(lab), ignore).payload)
    assert victim not in pool.members


def test_a_task_with_foreign_weights_is_refused_by_the_actors(engine: SiteEngine, lab: Lab) -> None:
    task = rollout_task(lab)
    foreign = task.policy.model_copy(update={"base_sha256": "0" * 64})
    with pytest.raises(PeerFault) as caught:
        engine.run(task.model_copy(update={"policy": foreign}), inputs_of(lab), ignore)
    assert caught.value.code == "wrong_policy"


# --- who is let in ------------------------------------------------------------------------


def test_only_the_clusters_token_opens_it(
    cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_own_cluster(cluster.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with pytest.raises(Unauthorised, match="another token") as caught:
        require_own_cluster(cluster.address)
    assert caught.value.code == "ray_token"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(folder))
    with pytest.raises(Unauthorised, match="There is no Ray token"):
        require_own_cluster(cluster.address)


UNGUARDED = """
import ray, sys
context = ray.init(address="local", num_cpus=0, include_dashboard=False, log_to_driver=False,
                   object_store_memory=80 << 20, _temp_dir=sys.argv[1])
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


def test_a_cluster_open_to_strangers_is_refused(cluster: Any, folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", UNGUARDED, str(folder / "open")],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with pytest.raises(InvalidRequest, match="obeys whoever reaches it") as caught:
            require_own_cluster(address)
        process.communicate("")
    assert caught.value.code == "ray_exposed"
    require_guarded(cluster.address)


JOIN = """
import json, sys, threading
from pathlib import Path
from site_runners import Doubler
from shoal.protocol.errors import ShoalError
from shoal.rl.ray_site import open_site
from shoal.rl.site import SiteShape
try:
    site = open_site(sys.argv[1], SiteShape(**json.loads(sys.argv[2])), Path(sys.argv[3]))
except ShoalError as error:
    print(json.dumps(error.to_wire()))
    sys.exit()
stepped, ended = threading.Event(), []
def work():
    try:
        site.run([("step for ever", 0)], lambda member: (), stepped.set)
    except ShoalError as error:
        ended.append(error.code)
site.start(Doubler)
thread = threading.Thread(target=work)
thread.start()
stepped.wait()
site.close()
thread.join()
print(json.dumps({"actors": site.num_actors, "ended": ended}))
"""


def join(address: str, folder: Path, **shape: object) -> dict[str, Any]:
    """What another worker gets from the cluster, which it leaves in the middle of its work."""
    return tell(JOIN, os.environ, address, json.dumps(shape), str(folder))


def tell(code: str, environment: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """The JSON object that a process of its own prints."""
    answer = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        check=False,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def test_a_cluster_with_a_dashboard_is_refused(cluster: Any, site: RaySite, folder: Path) -> None:
    # What a head with a dashboard writes down; the dashboard itself needs more packages.
    ray_kv._internal_kv_put(b"webui:url", b"127.0.0.1:8265", namespace=b"dashboard")
    refused = join(cluster.address, folder)
    assert refused["code"] == "ray_exposed"
    assert "--include-dashboard=false" in refused["message"]
    ray_kv._internal_kv_del(b"webui:url", namespace=b"dashboard")
    assert join(cluster.address, folder) == {"actors": 6, "ended": ["site_closed"]}


def test_a_cluster_without_room_is_refused(cluster: Any, site: RaySite, folder: Path) -> None:
    refused = join(cluster.address, folder, num_actors=3, cpus_per_actor=MANY_CPUS)
    assert refused["code"] == "ray_room"
    assert "room for 1 actors" in refused["message"]


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        ("ray://127.0.0.1:10001", InvalidRequest, "no Ray address"),
        ("127.0.0.1", InvalidRequest, "no Ray address"),
        ("127.0.0.1:99999", InvalidRequest, "no Ray address"),
        ("/ip4/127.0.0.1/tcp/1/p2p/x:1", InvalidRequest, "no Ray address"),
        ("127.0.0.1:1", Unavailable, "Nothing answers"),
    ],
)
def test_an_address_that_is_none_is_refused(
    address: str, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        require_own_cluster(address)


# --- a cluster of the worker's own --------------------------------------------------------

OWN = """
import json, sys
from pathlib import Path
import psutil
from shoal.worker.config import load_config
from shoal.worker.site import open_engine
options = {"orchestrator": "http://127.0.0.1:1", "data_dir": Path(sys.argv[1]),
           "ray.address": "local", "ray.actors": 3, "ray.object_store_bytes": 80 << 20}
engine = open_engine(load_config(None, {}, options))
family = [psutil.Process(), *psutil.Process().children(recursive=True)]
hosts = {c.laddr.ip for p in family for c in p.net_connections() if c.status == "LISTEN"}
engine.close()
print(json.dumps({"hosts": sorted(hosts), "actors": engine.num_actors,
                  "left": len(psutil.Process().children())}))
"""


def test_a_cluster_of_its_own_listens_on_the_loopback_alone(folder: Path) -> None:
    data = folder / "own"
    data.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    found = tell(OWN, {**environment, "HOME": str(data)}, str(data))
    assert {host.removeprefix("::ffff:") for host in found["hosts"]} == {"127.0.0.1"}
    assert found["actors"] == 3
    assert found["left"] == 0
    # Neither its files are left, nor a token that would open whatever this user starts next.
    assert [path.name for path in data.iterdir()] == []


# --- last, because it takes a node away ---------------------------------------------------


def test_a_dead_node_costs_its_actors_and_no_result(
    cluster: Any, site: RaySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two pools, one has half its actors on the node that dies, and one has all."""
    half = one_more(SiteShape(), gpus=1.0)
    half.start(Doubler)
    half.wait_ready(2)
    all_there = one_more(SiteShape(cpus_per_actor=FEW_CPUS + 1))
    all_there.start(Doubler)
    all_there.wait_ready(2)
    (victim,) = [member for member in half.members if member.node_id != half.node_id]
    os.kill(victim.pid, signal.SIGSTOP)
    (node,) = cluster.worker_nodes
    died: list[None] = []

    def take_away() -> None:
        if not died:
            died.append(None)
            # First: a stopped process whose parent ends is continued, and could still answer.
            os.kill(victim.pid, signal.SIGKILL)
            cluster.remove_node(node, allow_graceful=False)

    assert half.run([("double", 1), ("double", 2)], nothing_given, take_away) == [2, 4]
    assert victim not in half.members
    all_there.start_timeout_s = 1.0
    with pytest.raises(Unavailable, match="no actor to compute with") as caught:
        all_there.run([("double", 1)], nothing_given, ignore)
    assert caught.value.code == "site_lost"
    # That task has waited for the whole pool; the next one is told at once.
    waits: list[float] = []
    wait = all_there._wait

    def noted(refs: Sequence[Any], timeout_s: float = math.inf) -> Any:
        waits.append(timeout_s)
        return wait(refs, timeout_s)

    monkeypatch.setattr(all_there, "_wait", noted)
    with pytest.raises(Unavailable, match="none started within 1 s"):
        all_there.run([("double", 1)], nothing_given, ignore)
    assert waits == [0.0]
