"""The orchestrator's only record: a relational database."""
