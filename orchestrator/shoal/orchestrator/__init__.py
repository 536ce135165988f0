"""The orchestrator: splits jobs into tasks, auctions them, verifies, aggregates, settles."""
