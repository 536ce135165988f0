"""Loading the large libraries when it suits, rather than when a task first needs them."""

from __future__ import annotations


def load_libraries(num_threads: int) -> None:
    """torch, transformers and PEFT are imported, and torch computes with ``num_threads``.

    Takes seconds; call it in the thread that will compute.  More threads than free cores are
    many times slower than one: idle OpenMP threads spin.
    """
    import peft  # noqa: F401  # named only to be loaded
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  # likewise

    torch.set_num_threads(num_threads)
