"""The network against what carries the same bytes without it, side by side in one run."""
