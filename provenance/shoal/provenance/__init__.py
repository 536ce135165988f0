"""Who contributed what: signed statements, the log that orders them, the bundle, its proof."""

from shoal.provenance.bundle import Bundle, read_bundle, write_bundle
from shoal.provenance.dsse import Envelope
from shoal.provenance.log import EpochLog
from shoal.provenance.report import Report
from shoal.provenance.statement import StatementKind
from shoal.provenance.verifier import verify_bundle

__all__ = [
    "Bundle",
    "Envelope",
    "EpochLog",
    "Report",
    "StatementKind",
    "read_bundle",
    "verify_bundle",
    "write_bundle",
]
