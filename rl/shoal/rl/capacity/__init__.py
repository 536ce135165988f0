"""What a job needs before it runs: memory, traffic, time, money, and who can do it."""
