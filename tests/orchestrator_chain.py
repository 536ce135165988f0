"""The chain as the orchestrator's lab has it: in memory, with the escrow's own rules."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from hexbytes import HexBytes
from ledger_double import MemoryLedger

from shoal.contracts.delivery import Answer, Attempt, Landing
from shoal.contracts.records import Deployment, EpochPost, EscrowState, PostedEpoch
from shoal.contracts.records import StakeInfo as Stake
from shoal.contracts.transactions import Call
from shoal.protocol.errors import ChainRejected, NotFound, Unavailable

ADDRESSES = {name: "0x" + digit * 40 for name, digit in zip("abcd", "1234", strict=True)}
DEPLOYMENT = Deployment(
    chain_id=31337,
    token=ADDRESSES["a"],
    stake_vault=ADDRESSES["b"],
    job_escrow=ADDRESSES["c"],
    provenance_log=ADDRESSES["d"],
    fault_court="0x" + "5" * 40,
    model_shares="0x" + "6" * 40,
    block_number=0,
)
FUNDED_MICROS = 1_000_000


class MemoryChain:
    """What the orchestrator needs of the chain, with the escrow's own rules.

    It is all contracts of a gateway at once.  ``fail_after_post`` mines the next transaction
    and then answers nothing more; ``down`` answers nothing at all.
    """

    def __init__(self) -> None:
        self.vault = self.escrow = self.connection = self
        self.ledger = _Ledger(self)
        self.sender = SimpleNamespace(transactions=self.ledger)
        self.address = ADDRESSES["c"]
        self.owners: dict[bytes, str] = {}
        self.stakes: dict[str, int] = {}
        self.escrows: dict[str, EscrowState] = {}
        self.posted: list[PostedEpoch] = []
        self.fail_after_post = False
        self.down = False
        self.before_post: Callable[[], Awaitable[None]] | None = None

    def open(self, job_id: str, coordinator: str, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "job_id": job_id,
            "sponsor": ADDRESSES["a"],
            "coordinator": coordinator,
            "deadline_s": 1 << 40,
            "epoch": 0,
            "funded_micros": FUNDED_MICROS,
            "committed_micros": 0,
            "claimed_micros": 0,
            "refunded_micros": 0,
            "closed": False,
            "frozen": False,
            "bond_micros": 0,
            "pay_root": "0x" + "0" * 64,
            "ready_at_s": 0,
        }
        self.escrows[job_id] = EscrowState(**{**fields, **changes})

    async def node_owner(self, node_key: bytes) -> str | None:
        self.answer()
        return self.owners.get(node_key)

    async def stake_of(self, account: str) -> Stake:
        self.answer()
        return Stake(active_micros=self.stakes.get(account, 0), unbonding_micros=0, unbond_at_s=0)

    async def block(self) -> dict[str, Any]:
        self.answer()
        return {"hash": HexBytes(b"\xb1" * 32), "number": 12}

    async def job(self, job_id: str, *, depth: int = 0) -> EscrowState:
        self.answer()
        if job_id not in self.escrows:
            raise NotFound(f"The chain holds no job {job_id}.", code="no_such_job")
        return self.escrows[job_id]

    async def now_s(self) -> int:
        return 1_000

    async def claimed(self, job_id: str, account: str) -> int:
        return 0

    async def challenge_window_s(self) -> int:
        return 0

    async def min_bond_micros(self) -> int:
        self.answer()
        return 0

    async def epochs(self, job_id: str, from_block: int | None = None) -> list[PostedEpoch]:
        self.answer()
        return [post for post in self.posted if post.job_id == job_id]

    async def closing(self, job_id: str, from_block: int | None = None) -> Landing | None:
        return None

    def post_call(self, post: EpochPost) -> Call:
        return Call(to=self.address, data=b"p" + post.encode(), purpose=f"post {post.epoch}")

    def close_call(self, job_id: str) -> Call:
        return Call(to=self.address, data=b"c" + job_id.encode(), purpose="close the job")

    def reset(self) -> None:
        raise AssertionError("the orchestrator's lab has no reorganisations")

    def run(self, data: bytes, tx_hash: str, *, commit: bool) -> None:
        """Runs a `post_call` or a `close_call`, as the escrow would."""
        if data[:1] == b"c":
            job_id = data[1:].decode()
            closed = self.escrows[job_id].model_copy(update={"closed": True})
            if commit:
                self.escrows[job_id] = closed
            return
        post = EpochPost.decode(data[1:])
        escrow = self.escrows[post.job_id]
        if post.epoch != escrow.epoch + 1:
            raise ChainRejected("The escrow refused the epoch.", reason="WrongEpoch")
        if not escrow.committed_micros <= post.cumulative_micros <= escrow.funded_micros:
            raise ChainRejected("The escrow refused the total.", reason="TotalAboveFunds")
        if commit:
            self.escrows[post.job_id] = escrow.model_copy(
                update={"epoch": post.epoch, "committed_micros": post.cumulative_micros}
            )
            where: dict[str, Any] = {
                "tx_hash": tx_hash,
                "block_number": 7,
                "block_hash": "0x" + "7" * 64,
            }
            self.posted.append(PostedEpoch(**post.model_dump(), **where))

    def answer(self) -> None:
        if self.down:
            raise Unavailable("Nothing answers at the chain's URL.")


class _Ledger(MemoryLedger):
    """The ledger behind a `MemoryChain`: away when the chain is."""

    def __init__(self, chain: MemoryChain) -> None:
        super().__init__(chain)
        self._chain = chain

    async def num_spent(self, block: str = "latest") -> int:
        self._chain.answer()
        return await super().num_spent(block)

    async def broadcast(self, attempt: Attempt) -> tuple[Answer, str]:
        if self._chain.before_post is not None:
            await self._chain.before_post()
        answer = await super().broadcast(attempt)
        self._chain.down = self._chain.fail_after_post
        self._chain.fail_after_post = False
        return answer
