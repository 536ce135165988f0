"""How nodes reach each other: identity, requests, gossip and content-addressed blobs.

The libp2p node is imported from its own module (`shoal.network.libp2p_node`), so that what
needs only an identity or a blob store does not pay for libp2p's import.
"""

from shoal.network.blob_client import BlobClient
from shoal.network.blob_server import BlobServer
from shoal.network.blob_store import BlobStore
from shoal.network.identity import NodeIdentity
from shoal.network.port import Limits, Network

__all__ = ["BlobClient", "BlobServer", "BlobStore", "Limits", "Network", "NodeIdentity"]
