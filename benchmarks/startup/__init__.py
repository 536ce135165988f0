"""How soon a command, a market and a worker are ready, and how much memory they take."""
