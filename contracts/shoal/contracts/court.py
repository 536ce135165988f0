"""Where faults are proven, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, StrEnum
from typing import Any, cast

from eth_typing import ABIFunction
from eth_utils.abi import abi_to_signature, function_signature_to_4byte_selector
from web3.logs import DISCARD

from shoal.contracts.artefact import artefact
from shoal.contracts.connection import account_address, hash_bytes, job_id_bytes
from shoal.contracts.contract import BoundContract, Hands
from shoal.contracts.records import ZERO_ADDRESS, Mined
from shoal.contracts.token import Token
from shoal.contracts.transactions import Call
from shoal.protocol.errors import InvalidRequest, NotFound
from shoal.protocol.ids import Address, Hex32
from shoal.protocol.record import Record

OBJECTIVE_FAULTS = (
    "equivocation",
    "doublePay",
    "priceAboveBid",
    "priceBelowBid",
    "droppedBid",
    "twoBooks",
)
"""The court's functions that need no judge."""


class Fault(IntEnum):
    """What an account is accused of, as the court numbers it."""

    EQUIVOCATION = 0
    DOUBLE_PAY = 1
    PRICE_ABOVE_BID = 2
    PRICE_BELOW_BID = 3
    DROPPED_BID = 4
    TWO_BOOKS = 5
    SUBJECTIVE = 6


class CaseStatus(StrEnum):
    """Where a case stands; the court's numbers are the order of these."""

    NONE = "none"
    OPEN = "open"
    UPHELD = "upheld"
    DISMISSED = "dismissed"
    LAPSED = "lapsed"


_STATUSES = tuple(CaseStatus)


class CourtCase(Record):
    """One case, as the court holds it.  ``vote_by_s`` is 0 where nobody votes."""

    case_id: Hex32
    accused: Address
    fault: Fault
    status: CaseStatus
    vote_by_s: int
    challenger: Address
    job_id: Hex32
    evidence: Hex32


class FaultCourt(BoundContract):
    """``FaultCourt``."""

    name = "FaultCourt"

    def __init__(self, hands: Hands, address: str, token: Token) -> None:
        super().__init__(hands, address)
        self._token = token

    async def case(self, case_id: str) -> CourtCase:
        """The case.

        Raises:
            NotFound: there is none with this id.
        """
        held = await self._view_struct("caseOf", hash_bytes("case id", case_id))
        if held["accused"] == ZERO_ADDRESS:
            raise NotFound(f"The court holds no case {case_id}.", code="no_such_case")
        return CourtCase(
            case_id=case_id,
            accused=held["accused"],
            fault=Fault(held["fault"]),
            status=_STATUSES[held["status"]],
            vote_by_s=held["voteBy"],
            challenger=held["challenger"],
            job_id="0x" + held["jobId"].hex(),
            evidence="0x" + held["evidence"].hex(),
        )

    async def prove(self, calldata: bytes) -> CourtCase:
        """An objective fault is recorded, and has cost the accused what it costs.

        Args:
            calldata: A call of one of `OBJECTIVE_FAULTS`, as a fault proof gives it.

        Raises:
            InvalidRequest: it is no such call.
            ChainRejected: the evidence does not show the fault, or the case is decided.
        """
        return await self._case_after("Decided", self.proof_call(calldata))

    def proof_call(self, calldata: bytes) -> Call:
        """The transaction that proves an objective fault."""
        selectors = {
            function_signature_to_4byte_selector(abi_to_signature(entry)): entry["name"]
            for entry in cast(Sequence[ABIFunction], artefact(self.name).abi)
            if entry.get("name") in OBJECTIVE_FAULTS
        }
        function = selectors.get(calldata[:4])
        if function is None:
            raise InvalidRequest(
                "This is no proof of a fault: it calls none of the court's functions "
                f"{', '.join(OBJECTIVE_FAULTS)}.",
                code="not_a_proof",
            )
        return Call(to=self.address, data=calldata, purpose=f"prove {function}")

    async def challenge_bond_micros(self) -> int:
        """What opening a case that people judge takes, and losing it costs."""
        return cast(int, await self._view("CHALLENGE_BOND"))

    async def challenge(self, job_id: str, accused: str, evidence: str) -> CourtCase:
        """A case that only people can judge is open, with our bond.

        Args:
            job_id: The job that was harmed.
            accused: Who did it.
            evidence: Hash of what the verifiers are to look at.
        """
        bond_micros = await self.challenge_bond_micros()
        if bond_micros:
            await self._token.approve(self.address, bond_micros)
        args = [job_id_bytes(job_id), account_address(accused), hash_bytes("evidence", evidence)]
        return await self._case_after(
            "Challenged", self._call("challenge", args, f"challenge {accused}")
        )

    async def resolve(self, case_id: str, *, guilty: bool, signatures: Sequence[bytes]) -> Mined:
        """An open case is decided by a quorum's votes.

        Args:
            case_id: The case.
            guilty: What all of them say.
            signatures: Theirs of the vote, in ascending order of their accounts.
        """
        args = [hash_bytes("case id", case_id), guilty, list(signatures)]
        return await self._send("resolve", args, f"decide case {case_id}")

    async def lapse(self, case_id: str) -> Mined:
        """A case that nobody decided in time is over, and its challenger has the bond back."""
        return await self._send("lapse", [hash_bytes("case id", case_id)], f"end case {case_id}")

    async def _case_after(self, event: str, call: Call) -> CourtCase:
        mined = await self._hands.sender.send(call)
        async with self._hands.connection.asking("read the receipt") as w3:
            receipt = await w3.eth.get_transaction_receipt(cast(Any, mined.tx_hash))
        logs = self._contract.events[event]().process_receipt(receipt, errors=DISCARD)
        return await self.case("0x" + logs[0]["args"]["caseId"].hex())
