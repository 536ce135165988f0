"""The market's pure rules: who wins a lot, who holds a lease, who is owed what.

Integers only, no I/O, and time is passed in; the orchestrator drives these functions and
keeps their records.  A bid is sealed (`sealing`), shown and frozen (`frozen`), and wins a rung
of a lot (`clearing`, `pricing`, `reserve`), which the certificate proves (`certificate`,
`replay`, `fault`).  Work goes down the ladder (`ladder`) as leases (`lease`, `pace`), and what
becomes of them is a provider's record (`reputation`, `handicap`, `cooldown`, `capacity`) and
its pay (`freshness`, `settlement`).
"""
