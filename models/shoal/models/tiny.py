"""A small Llama-type model and a character tokenizer, built in code.

Large enough to learn two-digit arithmetic on a CPU in seconds; in every other respect a
stock Hugging Face model, so that nothing downstream can tell it from a downloaded one.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
UNKNOWN_TOKEN = "<unk>"
CHARACTERS = string.digits + "+-=*/()., ?:" + string.ascii_letters
MAX_POSITIONS = 256
_WORD = re.compile(r"[A-Za-z]{2,}[: ]*")

LM_HEAD_GAIN = 6.0
"""The head's initial scale relative to the default.

LoRA on "all-linear" leaves the head frozen; at the default scale its logits stay too small
for the adapter to sharpen the softmax, and sampled accuracy stalls.
"""


def build_tokenizer(pieces: Sequence[str] = ()) -> Any:
    """A word-level tokenizer of single characters, and of ``pieces`` wherever they stand.

    Pieces make a long fixed instruction a few tokens, the longest that fits first; digits and
    signs stay single.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = dict.fromkeys([PAD_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN, *CHARACTERS, *pieces])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    longest_first = sorted(pieces, key=lambda piece: (-len(piece), piece))
    choices = "|".join([*map(re.escape, longest_first), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(choices) if pieces else "", "isolated")
    tokenizer.decoder = decoders.Fuse()
    build: Any = PreTrainedTokenizerFast
    return build(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def split_words(text: str) -> list[str]:
    """The words of ``text``: two letters or more, with the blanks and colons that follow."""
    return _WORD.findall(text)


def build_model(seed: int, vocab_size: int) -> Any:
    """A fresh ``LlamaForCausalLM`` of 0.66 M parameters; equal seeds give equal weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(LM_HEAD_GAIN)
    return model
