"""A small internet inside one machine: hosts, home routers with NAT, slow and cut links.

Every host is a network namespace of its own.  The lab's "internet" is a router that forwards
between them; a `Lan` is a second router that masquerades and drops what nobody inside asked for.

    with NetLab() as lab:
        public = lab.host("orchestrator")
        home = lab.natted("worker")
        home.shape(up_mbit=20, down_mbit=100)
        home.delay(80)
        child = home.popen([sys.executable, "worker.py", public.ip])

Leaving the block kills every process that is left in it and removes every namespace.  What a
killed run left behind is removed by the next lab.  Needs root, iproute2 and nftables: a test
calls `require()` first, which skips it where they are missing.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pytest
from netlab_link import (
    COMMAND_TIMEOUT_S,
    DEATH_TIMEOUT_S,
    UPLINK,
    Link,
    NetLabError,
    Wire,
    command,
    dies_with_us,
    expect,
    ip_in,
    nft,
)

_PREFIX = "shoal"
_WIRE = Path(__file__).with_name("netlab_wire.py")
_SERIAL = itertools.count(1)
_BRIDGE = "lan"


class Nat(StrEnum):
    """How a home router treats connections."""

    PORT_RESTRICTED = "port-restricted"
    """A connection keeps its port to every destination: two such NATs can be punched."""
    SYMMETRIC = "symmetric"
    """Every connection leaves from a port of its own: nobody can tell it to another."""


def require() -> None:
    """The test goes on only where a lab can be built."""
    reason = why_not()
    if reason:
        pytest.skip(reason)


def why_not() -> str | None:
    """What keeps this machine from building a lab, if anything does."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc", "nft", "setpriv") if not shutil.which(name)]
    if missing:
        return f"missing commands: {', '.join(missing)} (Debian: iproute2 nftables util-linux)"
    probe = f"{_PREFIX}{os.getpid()}-{next(_SERIAL)}-probe"
    try:
        command("ip", "netns", "add", probe)
        try:
            nft(probe, "table ip probe { chain c { type nat hook postrouting priority 100; }; }")
        finally:
            command("ip", "netns", "del", probe)
    except NetLabError as error:
        return f"this machine refuses network namespaces: {error}"
    return None


class NetLab:
    """An internet of namespaces, gone with all its processes when the block ends."""

    def __init__(self) -> None:
        self._name = f"{_PREFIX}{os.getpid()}-{next(_SERIAL)}"
        # Global addresses, so that nothing which tells private from public ones is misled; the
        # second number differs between runs, because `here` lends one to the machine itself.
        self._subnets = (f"11.{os.getpid() % 250 + 1}.{number}" for number in range(1, 255))
        self._namespaces: list[str] = []
        self._wires: list[Wire] = []
        self._children: list[subprocess.Popen[Any]] = []
        self._internet = ""
        self._ports = itertools.count(1)

    def __enter__(self) -> NetLab:
        _sweep()
        atexit.register(self.close)
        try:
            self._internet = self.namespace("net", forwards=True)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def host(self, name: str) -> Host:
        """A machine with a public address and nothing in front of it."""
        host = Host(self, name, self.namespace(name))
        host.link = self.join_internet(host.netns)
        host.ip = host.public_ip = host.link.ip
        return host

    def lan(self, name: str, *, kind: Nat = Nat.PORT_RESTRICTED) -> Lan:
        """A home or office network behind a NAT router."""
        return Lan(self, name, kind)

    def natted(self, name: str, *, kind: Nat = Nat.PORT_RESTRICTED) -> Host:
        """A machine alone behind a NAT router of its own."""
        return self.lan(f"{name}-lan", kind=kind).host(name)

    def here(self) -> str:
        """The test's own process can reach public hosts, from the address returned."""
        subnet = next(self._subnets)
        device = f"sh{os.getpid()}n{next(_SERIAL)}"
        port = f"p{next(self._ports)}"
        command(
            *("ip", "link", "add", device, "type", "veth"),
            *("peer", "name", port, "netns", self._internet),
        )
        ip_in(self._internet, "addr", "add", f"{subnet}.1/30", "dev", port)
        ip_in(self._internet, "link", "set", port, "up")
        command("ip", "addr", "add", f"{subnet}.2/30", "dev", device)
        command("ip", "link", "set", device, "up")
        network = subnet.rsplit(".", 1)[0]
        command("ip", "route", "add", f"{network}.0.0/16", "via", f"{subnet}.1")
        return f"{subnet}.2"

    def close(self) -> None:
        """Nothing of the lab is left; a second call does nothing."""
        atexit.unregister(self.close)
        namespaces, self._namespaces = self._namespaces, []
        for netns in namespaces:
            _remove(netns)
        for child in (*self._children, *self._wires):
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            # Its namespace is gone and it was killed with it; this reaps it.
            child.kill()
            child.wait(DEATH_TIMEOUT_S)
        self._children.clear()
        self._wires.clear()

    def namespace(self, name: str, *, forwards: bool = False) -> str:
        """A new, empty namespace; one that forwards is a router."""
        netns = f"{self._name}-{name}"
        command("ip", "netns", "add", netns)
        self._namespaces.append(netns)
        ip_in(netns, "link", "set", "lo", "up")
        settings = ["echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"]
        if forwards:
            settings.append("echo 1 > /proc/sys/net/ipv4/ip_forward")
        command("ip", "netns", "exec", netns, "sh", "-c", "; ".join(settings))
        return netns

    def join_internet(self, netns: str) -> Link:
        """The namespace has a public address and a way to every other."""
        subnet = next(self._subnets)
        link = Link(
            wire=self.wire,
            netns=netns,
            far_netns=self._internet,
            far_device=f"p{next(self._ports)}",
            ip=f"{subnet}.2",
            prefix=30,
            gateway=f"{subnet}.1",
            bridge=None,
        )
        link.lay()
        return link

    def lay_link(self, netns: str, router: str, ip: str, gateway: str) -> Link:
        """The namespace is plugged into a LAN router's bridge."""
        link = Link(
            wire=self.wire,
            netns=netns,
            far_netns=router,
            far_device=f"p{next(self._ports)}",
            ip=ip,
            prefix=24,
            gateway=gateway,
            bridge=_BRIDGE,
        )
        link.lay()
        return link

    def adopt(self, child: subprocess.Popen[Any]) -> None:
        """The child is killed and reaped with the lab."""
        self._children.append(child)

    def wire(self, netns: str, device: str, far_netns: str, far_device: str) -> Wire:
        """A running wire between two devices it has made."""
        argv = dies_with_us(
            [sys.executable, "-I", str(_WIRE), netns, device, far_netns, far_device]
        )
        wire = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._wires.append(wire)
        expect(wire, b"up\n")
        return wire


class Lan:
    """A router that masquerades, and the hosts plugged into its switch."""

    def __init__(self, lab: NetLab, name: str, kind: Nat) -> None:
        self._lab = lab
        self.router = lab.namespace(name, forwards=True)
        self.link = lab.join_internet(self.router)
        self.public_ip = self.link.ip
        self._hosts = itertools.count(2)
        ip_in(self.router, "link", "add", _BRIDGE, "type", "bridge")
        ip_in(self.router, "addr", "add", "192.168.7.1/24", "dev", _BRIDGE)
        ip_in(self.router, "link", "set", _BRIDGE, "up")
        ports = "fully-random" if kind is Nat.SYMMETRIC else ""
        # What nobody inside asked for gets no answer at all, not even a refusal.
        nft(
            self.router,
            f"""
            table ip home {{
              chain outwards {{
                type nat hook postrouting priority 100; policy accept;
                oifname "{UPLINK}" masquerade {ports};
              }}
              chain through {{
                type filter hook forward priority 0; policy accept;
                iifname "{UPLINK}" ct state new drop;
              }}
              chain inwards {{
                type filter hook input priority 0; policy accept;
                iifname "{UPLINK}" ct state new drop;
              }}
            }}
            """,
        )

    def host(self, name: str) -> Host:
        """A machine on this network, whose public address is the router's."""
        host = Host(self._lab, name, self._lab.namespace(name))
        host.ip = f"192.168.7.{next(self._hosts)}"
        host.link = self._lab.lay_link(host.netns, self.router, host.ip, "192.168.7.1")
        host.public_ip = self.public_ip
        return host


class Host:
    """A machine of the lab.

    Attributes:
        name: As it was asked for.
        netns: The namespace's name, for `ip netns exec`.
        ip: Its own address.
        public_ip: The address that others see; the router's when there is one.
    """

    ip: str
    public_ip: str
    link: Link

    def __init__(self, lab: NetLab, name: str, netns: str) -> None:
        self._lab = lab
        self.name = name
        self.netns = netns

    def argv(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` here and dies with the thread that starts it."""
        return dies_with_us(["ip", "netns", "exec", self.netns, *argv])

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool = False,
    ) -> subprocess.Popen[Any]:
        """A process on this machine; it is killed when the lab closes, if not before."""
        child = subprocess.Popen(
            self.argv(argv), env=env, stdin=stdin, stdout=stdout, stderr=stderr, text=text
        )
        self._lab.adopt(child)
        return child

    async def start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> asyncio.subprocess.Process:
        """As `popen`, for asyncio; whoever starts it waits for it."""
        return await asyncio.create_subprocess_exec(
            *self.argv(argv), env=env, stdin=stdin, stdout=stdout, stderr=stderr
        )

    def run(
        self, argv: Sequence[str], *, timeout_s: float = COMMAND_TIMEOUT_S, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """The command has ended; its output is kept as text.

        Raises:
            NetLabError: It failed, and `check` is set.
        """
        return command(*self.argv(argv), timeout_s=timeout_s, check=check)

    def shape(self, *, up_mbit: float, down_mbit: float) -> None:
        """The link carries no more than this, in megabits per second."""
        self.link.shape(up_mbit=up_mbit, down_mbit=down_mbit)

    def delay(self, ms: float, *, loss_pct: float = 0.0) -> None:
        """Every packet takes `ms` longer in each direction, and some are lost on the way."""
        self.link.delay(ms, loss_pct=loss_pct)

    def cut(self) -> None:
        """No packet comes or goes, and nobody is told."""
        self.link.cut()

    def mend(self) -> None:
        """Packets pass again."""
        self.link.mend()


def _sweep() -> None:
    """Labs of processes that are gone are removed."""
    listed = command("ip", "netns", "list").stdout.splitlines()
    for netns in (line.split()[0] for line in listed if line.strip()):
        owner = netns.removeprefix(_PREFIX).partition("-")[0]
        if netns.startswith(_PREFIX) and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _remove(netns)


def _remove(netns: str) -> None:
    """No process is left in the namespace, and the namespace is gone."""
    deadline = time.monotonic() + DEATH_TIMEOUT_S
    while time.monotonic() < deadline:
        left = command("ip", "netns", "pids", netns, check=False).stdout.split()
        if not left:
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.02)
    command("ip", "netns", "del", netns, check=False)
