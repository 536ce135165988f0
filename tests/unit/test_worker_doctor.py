"""`shoal worker doctor`: each judgement at OK, WARN and FAIL; no check hangs or breaks another."""

from __future__ import annotations

import asyncio
import io
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account as EthAccount
from rich.console import Console
from worker_double import OrchestratorDouble

from shoal.network.identity import NodeIdentity
from shoal.network.memory import MemoryHub, MemoryNetwork
from shoal.protocol.errors import InvalidRequest, Unavailable
from shoal.protocol.keystore import create_account
from shoal.worker.backup import BackupNote
from shoal.worker.config import Device, WorkerConfig, load_config
from shoal.worker.doctor import chain, compute, keys, line, machine, reach
from shoal.worker.doctor.examination import Check, look_at_all
from shoal.worker.doctor.report import (
    Finding,
    Level,
    Report,
    fail,
    gathered,
    ok,
    show,
    size,
    warn,
)
from shoal.worker.doctor.visit import judge_orchestrator, listening_ports

GIB = 1 << 30
ACCOUNT = EthAccount.from_key("0x" + "11" * 32).address


def configured(folder: Path, **options: Any) -> WorkerConfig:
    return load_config(None, {}, {"data_dir": folder, **options})


@pytest.mark.parametrize(
    ("finding", "level", "words"),
    [
        (machine.judge_disk(30 * GIB, 0, 22 * GIB, "d"), Level.OK, "30 GiB free"),
        (machine.judge_disk(10 * GIB, 12 * GIB, 22 * GIB, "d"), Level.OK, "10 GiB free"),
        (machine.judge_disk(10 * GIB, 0, 22 * GIB, "d"), Level.WARN, "max_base_bytes"),
        (machine.judge_disk(GIB, 0, 22 * GIB, "d"), Level.FAIL, "move data_dir"),
        (machine.judge_disk(GIB, 0, GIB // 2, "d"), Level.OK, "1 GiB free"),
        (machine.judge_memory(8 * GIB, 16 * GIB), Level.OK, "8 GiB of 16 GiB"),
        (machine.judge_memory(2 * GIB, 16 * GIB), Level.WARN, "only small models"),
        (machine.judge_memory(GIB // 2, 16 * GIB), Level.FAIL, "stop other programs"),
        (machine.judge_processors(4, 4), Level.OK, "4 usable"),
        (machine.judge_processors(2, 4), Level.WARN, "set num_threads to 2"),
        (machine.judge_files(1_024, 4_096), Level.OK, "1024"),
        (machine.judge_files(-1, -1), Level.OK, "none"),
        (machine.judge_files(512, 4_096), Level.WARN, "ulimit -n 1024"),
        (machine.judge_files(128, 512), Level.FAIL, "as root"),
        (machine.judge_versions({"libp2p": "0.8.1"}, ["libp2p==0.8.1"]), Level.OK, "libp2p 0.8.1"),
        (machine.judge_versions({"torch": None}, []), Level.FAIL, "not installed: torch"),
        (
            machine.judge_versions({"libp2p": "0.9"}, ["x>=1", "libp2p==0.8.1"]),
            Level.FAIL,
            "pip install libp2p==0.8.1",
        ),
        (line.judge_offset("it", 100, 10), Level.OK, "100 ms ahead of it"),
        (line.judge_offset("it", -2_100, 200), Level.OK, "2.1 s behind it"),
        (line.judge_offset("it", -2_300, 200), Level.WARN, "timedatectl"),
        (line.judge_offset("it", 31_000, 0), Level.FAIL, "31.0 s ahead"),
        (line.judge_speed("down", 5.0, 5.0), Level.OK, "5 Mbit/s"),
        (line.judge_speed("up", 0.5, 2.0), Level.WARN, "capacity"),
        (line.judge_nat("h", "", 0, reached=False, is_home=False), Level.OK, "only dials out"),
        (line.judge_nat("h", "", 0, reached=True, is_home=True), Level.OK, "can be dialled"),
        (line.judge_nat("h", "blob_listen", 9, reached=True, is_home=False), Level.OK, "port 9"),
        (line.judge_nat("h", "blob_listen", 9, reached=False, is_home=False), Level.WARN, "router"),
        (
            line.judge_nat("h", "blob_listen", 9, reached=False, is_home=True),
            Level.WARN,
            "firewall",
        ),
    ],
)
def test_each_measure_is_judged(finding: Finding, level: Level, words: str) -> None:
    assert finding.level is level
    assert words in f"{finding.measured} {finding.mend}"
    assert bool(finding.mend) == (level is not Level.OK)


def torch_view(**changes: Any) -> compute.TorchView:
    usual = {"version": "2.9", "cuda": None, "threads": 2, "gpus": (), "mps": False}
    return compute.TorchView.model_validate({**usual, "problem": None, **changes})


H200 = compute.Gpu(name="H200", memory_bytes=140 * GIB)
SMALL = compute.Gpu(name="GT 1030", memory_bytes=2 * GIB)
DRIVER = compute.DriverView(gpus=("H200",), driver="550.1")
NONE = compute.DriverView()


@pytest.mark.parametrize(
    ("device", "view", "driver", "level", "words"),
    [
        (Device.AUTO, torch_view(), NONE, Level.OK, "cpu: no GPU seen"),
        (Device.CPU, torch_view(), DRIVER, Level.OK, "as set"),
        (Device.CUDA, torch_view(), NONE, Level.FAIL, "set device to auto"),
        (Device.AUTO, torch_view(cuda="12.8", gpus=(H200,)), DRIVER, Level.OK, "H200"),
        (Device.AUTO, torch_view(cuda="12.8", gpus=(SMALL,)), DRIVER, Level.WARN, "small models"),
        (Device.AUTO, torch_view(cuda="12.8", gpus=(H200, H200)), DRIVER, Level.WARN, "--ray"),
        (Device.AUTO, torch_view(), DRIVER, Level.WARN, "CUDA build of torch"),
        (Device.CUDA, torch_view(cuda="13.0"), DRIVER, Level.FAIL, "driver 550.1"),
        (
            Device.AUTO,
            torch_view(cuda="13.0", gpus=(H200,), problem="no kernel image"),
            DRIVER,
            Level.WARN,
            "does not compute",
        ),
        (
            Device.AUTO,
            torch_view(),
            compute.DriverView(problem="Driver/library version mismatch"),
            Level.WARN,
            "restart the machine",
        ),
        (Device.AUTO, torch_view(mps=True), NONE, Level.OK, "mps"),
        (Device.MPS, torch_view(), NONE, Level.FAIL, "no Apple GPU"),
    ],
)
def test_what_the_model_would_run_on(
    device: Device,
    view: compute.TorchView,
    driver: compute.DriverView,
    level: Level,
    words: str,
) -> None:
    finding = compute.judge_device(device, view, driver)
    assert finding.level is level
    assert words in f"{finding.measured} {finding.mend}"


def test_the_driver_is_read_or_its_complaint() -> None:
    assert compute.read_driver(0, "NVIDIA H200, 570.1, 143771\n", "") == compute.DriverView(
        gpus=("NVIDIA H200",), driver="570.1"
    )
    complaint = "Failed to initialize NVML: Driver/library version mismatch"
    assert compute.read_driver(18, complaint, "").problem == complaint
    assert compute.read_driver(0, "", "").problem == "exit code 0"


def test_a_program_that_hangs_is_ended() -> None:
    async def scenario() -> None:
        code, _, _ = await compute._run(0.05, "sleep", "60")
        assert code is None

    asyncio.run(scenario())


def holdings(balance: int, stake: int, gas: int) -> chain.Holdings:
    return chain.Holdings(balance_micros=balance, stake_micros=stake, gas_wei=gas)


@pytest.mark.parametrize(
    ("balance", "stake", "wanted", "level", "words"),
    [
        (0, 1_000_000, None, Level.OK, "$1.00 at stake"),
        (5_000_000, 0, None, Level.FAIL, "--stake 1.00"),
        (0, 0, None, Level.FAIL, f"send {ACCOUNT}"),
        (5_000_000, 0, "0.5", Level.FAIL, "raise --stake to 1.00"),
        (5_000_000, 0, "2.00", Level.OK, "puts up $2.00"),
        (500_000, 100_000, "2.00", Level.FAIL, "$1.40 more"),
    ],
)
def test_stake(
    tmp_path: Path, balance: int, stake: int, wanted: str | None, level: Level, words: str
) -> None:
    config = configured(tmp_path, stake=wanted)
    finding, _ = chain.judge_holdings(ACCOUNT, holdings(balance, stake, 1), 1_000_000, config)
    assert finding.level is level
    assert words in f"{finding.measured} {finding.mend}"


@pytest.mark.parametrize(
    ("gas", "level"), [(10**18, Level.OK), (10**12, Level.WARN), (0, Level.FAIL)]
)
def test_gas_money(tmp_path: Path, gas: int, level: Level) -> None:
    findings = chain.judge_holdings(ACCOUNT, holdings(0, 2, gas), 1, configured(tmp_path))
    assert findings[1].level is level


@pytest.mark.parametrize(
    ("age_s", "levels"),
    [
        (10, [Level.OK]),
        (3_600, [Level.WARN]),
        (-1, [Level.OK, Level.OK]),
        (-60, [Level.OK, Level.FAIL]),
    ],
)
def test_the_newest_block(age_s: int, levels: list[Level]) -> None:
    found = chain.judge_head("node", 1, 1_000_000, 1_000_000 + age_s)
    assert [finding.level for finding in found] == levels


def note(**changes: Any) -> BackupNote:
    usual = {"at_ms": 1_790_000_000_000, "node": NodeIdentity(bytes(32)).peer_id}
    return BackupNote.model_validate({**usual, "account": ACCOUNT, **changes})


def test_a_backup_counts_for_the_keys_it_holds() -> None:
    node = note().node
    assert keys.judge_backup(note(), node, ACCOUNT).level is Level.OK
    assert keys.judge_backup(None, node, ACCOUNT).level is Level.WARN
    other = NodeIdentity(b"o" * 32).peer_id
    assert "node key was replaced" in keys.judge_backup(note(), other, ACCOUNT).measured
    other_account = "0x" + "1" * 40
    assert "another account" in keys.judge_backup(note(), node, other_account).measured


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_keys_are_looked_at_and_none_is_made(tmp_path: Path) -> None:
    config = configured(tmp_path)
    found = by_check(keys.look_at_keys(config))
    assert {finding.level for finding in found.values()} == {Level.OK}
    assert list(tmp_path.iterdir()) == []
    account = create_account(config.account_path)
    identity = NodeIdentity.load_or_create(config.node_key_path)
    found = by_check(keys.look_at_keys(config))
    assert account.address in found["account_key"].measured
    assert identity.peer_id in found["node_key"].measured
    assert found["backup"].level is Level.WARN
    assert keys.account_of(config) == account.address


def test_a_key_that_others_may_read_fails(tmp_path: Path) -> None:
    config = configured(tmp_path)
    create_account(config.account_path)
    NodeIdentity.load_or_create(config.node_key_path)
    for path in (config.account_path, config.node_key_path):
        os.chmod(path, 0o644)
    found = by_check(keys.look_at_keys(config))
    assert found["account_key"].level is found["node_key"].level is Level.FAIL
    assert found["account_key"].mend == f"chmod 600 {config.account_path}"


def test_a_keystore_that_the_passphrase_does_not_open_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path)
    create_account(config.account_path)
    monkeypatch.setenv("SHOAL_PASSPHRASE", "another")
    found = by_check(keys.look_at_keys(config))
    assert found["account_key"].level is Level.FAIL
    assert found["account_key"].mend == "set SHOAL_PASSPHRASE"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"address": 5}', b"\xff" * 70_000])
def test_a_damaged_keystore_is_a_finding(tmp_path: Path, damage: bytes) -> None:
    config = configured(tmp_path)
    config.account_path.write_bytes(damage)
    os.chmod(config.account_path, 0o600)
    assert keys.account_of(config) is None
    assert by_check(keys.look_at_keys(config))["account_key"].level is Level.FAIL


def test_a_folder_that_is_not_there_yet_is_looked_at_above(tmp_path: Path) -> None:
    found = machine.look_at_disk(configured(tmp_path / "a" / "b"))
    assert str(tmp_path / "a" / "b") in found[0].measured
    assert list(tmp_path.iterdir()) == []


def test_hard_links_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(100_000))
    once = machine.bytes_below(tmp_path)
    os.link(tmp_path / "one", tmp_path / "two")
    assert machine.bytes_below(tmp_path) == once > 0


def test_this_machine_can_be_looked_at(tmp_path: Path) -> None:
    config = configured(tmp_path)
    looks: list[Callable[[], list[Finding]]] = [
        lambda: machine.look_at_disk(config),
        machine.look_at_memory,
        lambda: machine.look_at_processors(config),
        machine.look_at_files,
        machine.look_at_versions,
    ]
    for look in looks:
        assert all(finding.measured for finding in look())


def check(look: Callable[[], Any], name: str = "it") -> Check:
    return Check(name=name, what=name, look=look, deadline_s=0.05)


def test_a_check_that_hangs_or_breaks_is_a_finding_beside_the_others() -> None:
    async def hangs() -> list[Finding]:
        await asyncio.Event().wait()
        return []

    async def breaks() -> list[Finding]:
        raise KeyError("nothing there")

    async def refuses() -> list[Finding]:
        raise Unavailable("Nothing answers.")

    async def works() -> list[Finding]:
        return [ok("it", "it", "well")]

    found = asyncio.run(look_at_all([check(look) for look in (hangs, breaks, refuses, works)]))
    assert [findings[0].level for findings in found] == [Level.FAIL] * 3 + [Level.OK]
    assert found[0][0].measured == "no answer within 0.05 s"
    assert "KeyError" in found[1][0].measured
    assert "report this line" in found[1][0].mend
    assert found[2][0].measured == "Nothing answers."


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("/ip4/192.0.2.1/tcp/4001/p2p/12D3", ("192.0.2.1", 4001)),
        ("/ip6/2001:db8::1/tcp/1/ws/p2p/12D3", ("2001:db8::1", 1)),
        ("/dns4/m.example/tcp/443/tls/ws/p2p/12D3", ("m.example", 443)),
    ],
)
def test_what_an_address_dials(address: str, target: tuple[str, int]) -> None:
    assert reach.tcp_target(address) == target


@pytest.mark.parametrize("address", ["", "/", "/ip4/192.0.2.1/udp/1/quic", "/p2p/12D3", "x" * 900])
def test_an_address_without_a_port_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="names no host"):
        reach.tcp_target(address)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(-2, "unknown"), "DNS"),
        (TimeoutError(), "firewall"),
        (ConnectionRefusedError(111, "refused"), "nothing listens"),
        (OSError(113, "No route to host"), "check this machine's network"),
    ],
)
def test_why_nothing_is_reached(error: OSError, words: str) -> None:
    assert words in reach.why_not(error)[1]


def test_an_orchestrator_that_is_not_the_trusted_one_fails() -> None:
    greeting = OrchestratorDouble(
        MemoryNetwork(MemoryHub(), NodeIdentity.generate()), NodeIdentity.generate()
    ).greeting
    assert judge_orchestrator(greeting, None).level is Level.OK
    assert judge_orchestrator(greeting, greeting.orchestrator.lower()).level is Level.OK
    assert judge_orchestrator(greeting, "0x" + "1" * 40).level is Level.FAIL


def test_ports_that_others_are_to_reach(tmp_path: Path) -> None:
    assert listening_ports(configured(tmp_path)) == {}
    config = configured(tmp_path, blob_listen="0.0.0.0:8701")
    assert listening_ports(config) == {"blob_listen": 8701}
    assert listening_ports(configured(tmp_path, blob_listen="0.0.0.0:0")) == {}


REPORT = gathered(
    [
        [ok("disk", "disk", "80 GiB free")],
        [warn("clock", "clock", "3.0 s ahead", "set it")],
        [fail("gas", "gas money", "0 of\nthe \x1b[31mcoin", "send some")],
    ]
)


def test_a_report_reads_as_lines_and_ends_with_its_sense() -> None:
    stream = io.StringIO()
    show(REPORT, Console(file=stream, width=40))
    assert stream.getvalue() == (
        "OK    disk       80 GiB free\n"
        "WARN  clock      3.0 s ahead  — set it\n"
        "FAIL  gas money  0 of the [31mcoin  — send some\n"
        "1 thing to mend before this worker can work.\n"
    )


def test_a_report_for_programs() -> None:
    data = REPORT.to_json()
    assert data["passed"] is False
    assert data["findings"][1] == {
        "check": "clock",
        "level": "warn",
        "what": "clock",
        "measured": "3.0 s ahead",
        "mend": "set it",
    }
    assert REPORT.exit_code == 1
    assert Report(findings=REPORT.findings[:2]).exit_code == 0


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 bytes"), (1_023, "1023 bytes"), (1_536, "1.5 KiB"), (22 * GIB, "22 GiB")],
)
def test_sizes(num_bytes: int, words: str) -> None:
    assert size(num_bytes) == words
