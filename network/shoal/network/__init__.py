"""How nodes reach each other: identity, requests, gossip and content-addressed blobs.

What is costly to import has its own module: libp2p in `shoal.network.libp2p_node`, aiohttp
in `shoal.network.blob_server` and `shoal.network.blob_client`.
"""

from shoal.network.identity import NodeIdentity
from shoal.network.port import Limits, Network

__all__ = ["Limits", "Network", "NodeIdentity"]
