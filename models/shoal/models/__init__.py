"""Policies: bases, adapters, and the engine that samples from them."""
