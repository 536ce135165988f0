"""The links of `netlab`: cables, slow wires in their stead, and the commands that lay them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence

COMMAND_TIMEOUT_S = 20.0
DEATH_TIMEOUT_S = 5.0
UPLINK = "uplink"

Wire = subprocess.Popen[bytes]


class NetLabError(Exception):
    """A command that builds the lab failed; the message holds what it said."""


class Link:
    """The one link of a host or router: a virtual cable, or a slow wire in its stead."""

    def __init__(
        self,
        *,
        wire: Callable[[str, str, str, str], Wire],
        netns: str,
        far_netns: str,
        far_device: str,
        ip: str,
        prefix: int,
        gateway: str,
        bridge: str | None,
    ) -> None:
        self.ip = ip
        self._lay_wire = wire
        self._ends = ((netns, UPLINK), (far_netns, far_device))
        self._prefix = prefix
        self._gateway = gateway
        self._bridge = bridge
        self._wire: Wire | None = None
        self._rates: tuple[float, float] | None = None
        self._is_cut = False

    def lay(self) -> None:
        """The cable lies and carries addresses."""
        (netns, device), (far_netns, far_device) = self._ends
        command(
            *("ip", "link", "add", device, "netns", netns, "type", "veth"),
            *("peer", "name", far_device, "netns", far_netns),
        )
        self._configure()

    def shape(self, *, up_mbit: float, down_mbit: float) -> None:
        """Each end sends at its rate at most."""
        self._rates = (up_mbit, down_mbit)
        for (netns, device), rate_mbit in zip(self._ends, self._rates, strict=True):
            burst_bytes = max(16_000, round(rate_mbit * 1e6 / 8 / 100))
            command(
                *("tc", "-n", netns, "qdisc", "replace", "dev", device, "root", "tbf"),
                *("rate", f"{round(rate_mbit * 1000)}kbit"),
                *("burst", str(burst_bytes), "latency", "100ms"),
            )

    def delay(self, ms: float, *, loss_pct: float) -> None:
        """A wire carries the frames, each `ms` late."""
        if self._wire is None:
            (netns, device), (far_netns, far_device) = self._ends
            ip_in(netns, "link", "del", device)
            self._wire = self._lay_wire(netns, device, far_netns, far_device)
            self._configure()
            if self._rates is not None:
                self.shape(up_mbit=self._rates[0], down_mbit=self._rates[1])
            if self._is_cut:
                self.cut()
        setting = json.dumps({"delay_ms": ms, "loss_pct": loss_pct})
        assert self._wire.stdin is not None
        self._wire.stdin.write(setting.encode() + b"\n")
        self._wire.stdin.flush()
        expect(self._wire, b"set\n")

    def cut(self) -> None:
        """What arrives at either end is dropped.

        At arrival, because a sender is told of what it drops itself; and not the address
        queries, because their failure is told too.
        """
        self.mend()
        self._is_cut = True
        for netns, device in self._ends:
            nft(
                netns,
                f"""
                table netdev {self._cut_table} {{
                  chain arriving {{
                    type filter hook ingress device "{device}" priority 0; policy accept;
                    ether type != arp drop;
                  }}
                }}
                """,
            )

    def mend(self) -> None:
        """What arrives is let in."""
        self._is_cut = False
        for netns, _ in self._ends:
            # Declared first, so that deleting it never fails for its absence.
            table = f"table netdev {self._cut_table}"
            nft(netns, f"{table} {{}}\ndelete {table}")

    @property
    def _cut_table(self) -> str:
        return f"cut_{self._ends[1][1]}"

    def _configure(self) -> None:
        (netns, device), (far_netns, far_device) = self._ends
        ip_in(netns, "addr", "add", f"{self.ip}/{self._prefix}", "dev", device)
        ip_in(netns, "link", "set", device, "up")
        if self._bridge is None:
            ip_in(far_netns, "addr", "add", f"{self._gateway}/{self._prefix}", "dev", far_device)
        else:
            ip_in(far_netns, "link", "set", far_device, "master", self._bridge)
        ip_in(far_netns, "link", "set", far_device, "up")
        ip_in(netns, "route", "add", "default", "via", self._gateway)


def dies_with_us(argv: Sequence[str]) -> list[str]:
    """The command, killed when the thread that starts it ends."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *argv]


def ip_in(netns: str, *argv: str) -> None:
    """`ip` has done so in the namespace."""
    command("ip", "-n", netns, *argv)


def nft(netns: str, script: str) -> None:
    """The rules stand in the namespace."""
    command("ip", "netns", "exec", netns, "nft", "-f", "-", stdin=script)


def command(
    *argv: str, stdin: str = "", timeout_s: float = COMMAND_TIMEOUT_S, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """The command has ended.

    Raises:
        NetLabError: It failed, and `check` is set.
    """
    done = subprocess.run(
        argv, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if check and done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise NetLabError(f"{' '.join(argv)} ended with {done.returncode}: {said}")
    return done


def expect(wire: Wire, line: bytes) -> None:
    """The wire has said that it did what it was told."""
    assert wire.stdout is not None
    said = wire.stdout.readline()
    if said != line:
        raise NetLabError(f"the wire process ended with {wire.wait(DEATH_TIMEOUT_S)}")
