"""Account signatures: EIP-712 typed data over records.

Source: EIP-712 (typed structured data), EIP-2 (low-s signatures).
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Generic, TypeVar, cast

from eth_account.messages import SignableMessage, encode_typed_data
from eth_account.signers.local import LocalAccount
from eth_keys.datatypes import PrivateKey, Signature
from hexbytes import HexBytes
from pydantic import Field
from tiny_keccak import keccak256 as keccak

from shoal.protocol.errors import InvariantBroken, PeerFault, Unauthorised
from shoal.protocol.ids import Account, Address, Hex65
from shoal.protocol.record import MAX_INT, Record

_HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0
_RECOVERY_IDS = (27, 28)
_WORD_BYTES = 32


class Domain(Record):
    """Where a signature counts: one chain and one escrow contract.

    Writer: the orchestrator, in its greeting.  Reader: every signer and verifier.
    """

    chain_id: int = Field(gt=0, le=MAX_INT)
    escrow: Address

    def eip712(self) -> dict[str, Any]:
        """The EIP-712 domain separator's fields."""
        return {
            "name": "Shoal",
            "version": "1",
            "chainId": self.chain_id,
            "verifyingContract": self.escrow,
        }


class SignableRecord(Record):
    """A record an account signs.

    ``eip712_fields`` lists (name, Solidity type) in order; each name is a field of the
    record or a key that `eip712_message` adds.
    """

    eip712_fields: ClassVar[tuple[tuple[str, str], ...]] = ()

    def eip712_message(self) -> dict[str, Any]:
        """The values of ``eip712_fields``."""
        return {name: getattr(self, name) for name, _ in self.eip712_fields}


_S = TypeVar("_S", bound=SignableRecord)


class Signed(Record, Generic[_S]):
    """A record with its account's EIP-712 signature (65 bytes: r, s, v)."""

    record: _S
    signature: Hex65

    def signer(self, domain: Domain) -> Account:
        """The account that signed.

        Raises:
            PeerFault: the signature is not canonical (high s, odd v) or does not recover.
        """
        raw = bytes.fromhex(self.signature[2:])
        if int.from_bytes(raw[32:64], "big") > _HALF_ORDER or raw[64] not in _RECOVERY_IDS:
            raise PeerFault("The signature is not in canonical low-s form.", code="bad_signature")
        try:
            signature = Signature(raw[:64] + bytes([raw[64] - _RECOVERY_IDS[0]]))
            digest = signing_digest(self.record, domain)
            return Account(signature.recover_public_key_from_msg_hash(digest).to_checksum_address())
        except Exception as error:
            raise PeerFault(
                "The signature does not recover to any account.", code="bad_signature"
            ) from error

    def require_signer(self, domain: Domain, account: str) -> None:
        """Passes only if ``account`` signed.

        Raises:
            Unauthorised: somebody else signed, or the domain (chain, escrow) differs.
            PeerFault: the signature is malformed.
        """
        signer = self.signer(domain)
        if signer.lower() != account.lower():
            raise Unauthorised(
                f"The {type(self.record).__name__} names {account} but is signed by {signer} "
                f"(or for another chain than {domain.chain_id}); sign it with the named account.",
                code="wrong_signer",
            )


def sign(record: _S, domain: Domain, account: LocalAccount) -> Signed[_S]:
    """``record`` signed by ``account`` for ``domain``."""
    # Not `account.sign_message`, which takes three times as long for the same bytes.
    raw = _private_key(bytes(account.key)).sign_msg_hash(signing_digest(record, domain))
    signature = raw.to_bytes()[:64] + bytes([raw.v + _RECOVERY_IDS[0]])
    # The concrete class is known only now; pydantic caches the parametrised type.
    signed = cast("type[Signed[_S]]", Signed.__class_getitem__(type(record)))
    return signed(record=record, signature="0x" + signature.hex())


@functools.lru_cache(maxsize=4)
def _private_key(key: bytes) -> PrivateKey:
    """The key as the library wants it: making one computes its public key, as dear as signing."""
    return PrivateKey(key)


def signing_digest(record: SignableRecord, domain: Domain) -> bytes:
    """The 32 bytes an account signs for ``record``, by which the chain knows it.

    Source: EIP-712, ``keccak256(0x1901 ‖ domainSeparator ‖ hashStruct(message))``.
    """
    typed = _typed(record, domain)
    return keccak(b"\x19" + typed.version + typed.header + typed.body)


def _typed(record: SignableRecord, domain: Domain) -> SignableMessage:
    """What is signed: version 1, the domain's hash, the record's hash.

    As ``eth_account.messages.encode_typed_data`` makes it, which looks at the types anew for
    each record and takes many times longer.
    """
    values = record.eip712_message()
    words = [_type_hash(type(record).__name__, record.eip712_fields)]
    words += [_word(values[name], solidity) for name, solidity in record.eip712_fields]
    return SignableMessage(
        HexBytes(b"\x01"), _domain_hash(domain), HexBytes(keccak(b"".join(words)))
    )


@functools.lru_cache(maxsize=64)
def _domain_hash(domain: Domain) -> HexBytes:
    fields = [{"name": "x", "type": "uint8"}]
    return HexBytes(encode_typed_data(domain.eip712(), {"Any": fields}, {"x": 0}).header)


@functools.lru_cache(maxsize=64)
def _type_hash(name: str, fields: tuple[tuple[str, str], ...]) -> bytes:
    """Source: EIP-712, ``typeHash = keccak256(encodeType(typeOf(s)))``."""
    inside = ",".join(f"{solidity} {field}" for field, solidity in fields)
    return keccak(f"{name}({inside})".encode())


def _word(value: Any, solidity: str) -> bytes:
    """One field in 32 bytes.  Source: EIP-712, ``encodeData``.

    Raises:
        InvariantBroken: a record's declared type does not hold its value.
    """
    if solidity == "string":
        return keccak(value.encode())
    if solidity == "address":
        return bytes.fromhex(value[2:]).rjust(_WORD_BYTES, b"\0")
    if solidity == "bytes32" and len(value) == _WORD_BYTES:
        return bytes(value)
    if solidity == "bool":
        return bytes(_WORD_BYTES - 1) + bytes([bool(value)])
    if solidity.startswith("uint") and 0 <= value < 1 << int(solidity[4:]):
        return int(value).to_bytes(_WORD_BYTES, "big")
    raise InvariantBroken(f"A field of type {solidity} cannot be signed as {value!r}.")
