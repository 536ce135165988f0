"""Loading the large libraries when it suits, rather than when a task first needs them."""

from __future__ import annotations

import gc


def load_libraries(num_threads: int) -> None:
    """torch, transformers and PEFT are imported, and torch computes with ``num_threads``.

    Takes seconds; call it in the thread that will compute.  More threads than free cores are
    many times slower than one: idle OpenMP threads spin.
    """
    import peft  # noqa: F401  # named only to be loaded
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  # likewise

    torch.set_num_threads(num_threads)
    if not gc.get_freeze_count():
        _load_first_model()
        # What is there now stays as long as the process: half a million objects, which the
        # collector would go through again and again for as long as an update takes.
        gc.collect()
        gc.freeze()


def _load_first_model() -> None:
    """A model was loaded, the smallest there can be.

    At the first one of a process, of whatever kind, transformers compiles a thousand regular
    expressions, for longer than a small model takes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    weights = LlamaForCausalLM(config).state_dict()
    LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights)
