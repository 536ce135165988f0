"""What learning costs, and how well it learns, against peers and against itself."""
