"""The settlement chain: contract artefacts, the local chain, deployment and the gateway.

Import from the modules: `records` (no web3), `anvil`, `deployment`, `gateway`.
"""
