"""The namespace lab does what the tests that stand on it believe of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from netlab import Host, Nat, NetLab, require

# Answers each byte with itself, and tells who asked.
ECHO = """
import socket, threading
def answer(link, where):
    link.sendall(f"{where[0]} {where[1]}\\n".encode())
    while byte := link.recv(4096):
        link.sendall(byte)
server = socket.create_server(("0.0.0.0", 5000))
print("up", flush=True)
while True:
    threading.Thread(target=answer, args=server.accept(), daemon=True).start()
"""
# Prints who it was seen as, and the milliseconds until a byte came back.
ASK = """
import socket, sys, time
wait_s, *hosts = sys.argv[1:]
links = [socket.create_connection((host, 5000), timeout=float(wait_s)) for host in hosts]
for link in links:
    print(link.makefile("r").readline().strip())
begun = time.monotonic()
links[0].sendall(b"x")
links[0].recv(1)
print((time.monotonic() - begun) * 1000)
"""
SEND = """
import socket, sys, time
link = socket.create_connection((sys.argv[1], 5000), timeout=30)
link.makefile("r").readline()
begun = time.monotonic()
sent = 0
import threading
def send():
    link.sendall(bytes(2_000_000))
threading.Thread(target=send).start()
while sent < 2_000_000:
    sent += len(link.recv(1 << 16))
print(time.monotonic() - begun)
"""


@pytest.fixture
def lab() -> Iterator[NetLab]:
    require()
    with NetLab() as built:
        yield built


def serve(host: Host) -> None:
    child = host.popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"


def ask(host: Host, *targets: Host | str, timeout_s: float = 10.0) -> list[str]:
    ips = [target if isinstance(target, str) else target.ip for target in targets]
    return host.run([sys.executable, "-c", ASK, str(timeout_s), *ips]).stdout.splitlines()


def fails(host: Host, target: str) -> str:
    done = host.run([sys.executable, "-c", ASK, "0.5", target], check=False)
    assert done.returncode != 0
    return done.stderr.splitlines()[-1]


def test_a_host_at_home_reaches_out_and_nobody_reaches_in(lab: NetLab) -> None:
    public, home = lab.host("public"), lab.natted("home")
    serve(public)
    serve(home)
    seen = ask(home, public)[0].split()[0]
    assert seen == home.public_ip != home.ip
    # Silence, not a refusal, which would end a peer's simultaneous open.
    assert "timed out" in fails(public, home.public_ip)
    with_nat_off = lab.host("open")
    serve(with_nat_off)
    ask(public, with_nat_off)


def test_only_a_symmetric_nat_gives_each_destination_another_port(lab: NetLab) -> None:
    first, second = lab.host("first"), lab.host("second")
    serve(first)
    serve(second)
    # One local port towards both, as a punching peer uses it.
    probe = ASK.replace(
        "socket.create_connection((host, 5000), timeout=float(wait_s))",
        "bound((host, 5000))",
    ).replace(
        "links =",
        "def bound(target):\n"
        "    link = socket.socket()\n"
        "    link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "    link.bind(('0.0.0.0', 7001))\n"
        "    link.connect(target)\n"
        "    return link\n"
        "links =",
        1,
    )
    ports = {}
    for kind in Nat:
        home = lab.natted(kind.value, kind=kind)
        told = home.run([sys.executable, "-c", probe, "10", first.ip, second.ip]).stdout
        ports[kind] = [line.split()[1] for line in told.splitlines()[:2]]
    assert ports[Nat.PORT_RESTRICTED] == ["7001", "7001"]
    assert len(set(ports[Nat.SYMMETRIC])) == 2


def test_hosts_of_one_lan_meet_without_leaving_it(lab: NetLab) -> None:
    lan = lab.lan("office")
    first, second = lan.host("first"), lan.host("second")
    serve(second)
    assert ask(first, second)[0].split()[0] == first.ip


def test_a_delay_is_added_in_both_directions_and_can_be_taken_away(lab: NetLab) -> None:
    public, home = lab.host("public"), lab.natted("home")
    serve(public)
    home.delay(60)
    assert float(ask(home, public)[-1]) >= 120
    home.delay(0)
    assert min(float(ask(home, public)[-1]) for _ in range(5)) < 120


def test_a_shaped_link_carries_no_more_than_its_rate(lab: NetLab) -> None:
    public, home = lab.host("public"), lab.natted("home")
    serve(public)
    home.shape(up_mbit=16, down_mbit=100)
    # 2 MB at 16 Mbit/s take a second; the burst and the queue take some of it off.
    took_s = float(home.run([sys.executable, "-c", SEND, public.ip]).stdout)
    assert took_s > 0.7


def test_lost_packets_are_sent_again(lab: NetLab) -> None:
    public, home = lab.host("public"), lab.natted("home")
    serve(public)
    home.delay(1, loss_pct=5)
    home.run([sys.executable, "-c", SEND, public.ip])


@pytest.mark.parametrize("over_a_wire", [False, True])
def test_a_cut_link_is_silent_until_it_is_mended(lab: NetLab, over_a_wire: bool) -> None:
    public, home = lab.host("public"), lab.natted("home")
    serve(public)
    if over_a_wire:
        home.delay(1)
    home.cut()
    assert "timed out" in fails(home, public.ip)
    home.mend()
    ask(home, public)


def test_nothing_is_left_when_the_block_ends() -> None:
    require()
    with NetLab() as lab:
        home = lab.natted("home")
        home.delay(1)
        child = home.popen([sys.executable, "-c", "import time; time.sleep(600)"])
        netns = home.netns
    assert child.returncode is not None
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert netns not in listed


def test_what_a_killed_run_left_is_removed_by_the_next_lab() -> None:
    require()
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from netlab import NetLab\n"
        "lab = NetLab().__enter__()\n"
        "print(lab.natted('home').netns, flush=True)\n"
        "os._exit(1)\n"
    )
    here = os.path.dirname(os.path.dirname(__file__))
    listing = ["ip", "netns"]
    with subprocess.Popen(
        [sys.executable, "-c", script, here], stdout=subprocess.PIPE, text=True
    ) as killed:
        assert killed.stdout is not None
        netns = killed.stdout.readline().strip()
        # Until it is waited for it keeps its number, and no lab beside this test sweeps up.
        os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
        assert netns in subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    with NetLab():
        left = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    assert netns not in left
