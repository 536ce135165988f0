"""What of the vLLM engine is ours: which token a row is left, and what is noted of it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.models.sampling import draw_uniforms_bt, select_tokens_b
from shoal.models.vllm_engine import DrawBook, VllmEngine
from shoal.protocol.errors import InvalidRequest, InvariantBroken

ROWS, WIDTH, VOCABULARY, END = 3, 4, 11, 1


def logits_btv() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(ROWS, WIDTH, VOCABULARY, generator=generator)


def drawn(book: DrawBook, order: list[tuple[int, int]]) -> np.ndarray:
    """The tokens the book chooses, asked in ``order`` of (row, position), two at a time."""
    tokens_bt = np.zeros((ROWS, WIDTH), dtype=np.int32)
    for start in range(0, len(order), 2):
        row_n, position_n = np.array(order[start : start + 2]).T
        chosen_n = book.choose(logits_btv()[row_n, position_n], row_n, position_n)
        tokens_bt[row_n, position_n] = chosen_n.numpy()
    return tokens_bt


ORDER = [(row, position) for position in range(WIDTH) for row in range(ROWS)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_uniforms_choose_whatever_the_order_of_rows(temperature: float) -> None:
    uniforms_bt = draw_uniforms_bt(5, range(ROWS), WIDTH)
    book = DrawBook(END)
    book.open(uniforms_bt, temperature)
    tokens_bt = drawn(book, ORDER[::-1])
    logprobs_btv = torch.log_softmax(logits_btv() / temperature, dim=-1)
    for row in range(ROWS):
        selected = select_tokens_b(logprobs_btv[row], torch.from_numpy(uniforms_bt[row]))
        assert selected.tolist() == tokens_bt[row].tolist()
    noted = book.logprobs(list(tokens_bt))
    for row in range(ROWS):
        ours = logprobs_btv[row, torch.arange(WIDTH), torch.from_numpy(tokens_bt[row]).long()]
        assert np.array_equal(noted[row], ours.numpy())


def test_without_uniforms_the_likeliest_is_left() -> None:
    book = DrawBook(END)
    book.open(None, 1.0)
    assert np.array_equal(drawn(book, ORDER), logits_btv().argmax(dim=-1).numpy())


def test_a_row_that_was_drawn_otherwise_is_found_out() -> None:
    book = DrawBook(END)
    book.open(draw_uniforms_bt(5, range(ROWS), WIDTH), 1.0)
    tokens_bt = drawn(book, ORDER)
    assert len(book.logprobs(list(tokens_bt))) == ROWS
    tokens_bt[1, 2] = (tokens_bt[1, 2] + 1) % VOCABULARY
    with pytest.raises(InvariantBroken, match="row 1") as broken:
        book.logprobs(list(tokens_bt))
    assert broken.value.code == "unseeded_sampling"


def test_nothing_noted_is_found_out() -> None:
    book = DrawBook(END)
    book.open(None, 1.0)
    with pytest.raises(InvariantBroken, match="in this process"):
        book.logprobs([np.array([3], dtype=np.int32)])


def test_a_missing_vllm_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(InvalidRequest, match=r"shoal\[vllm\]") as refused:
        VllmEngine(
            tmp_path,
            rank=8,
            eos_ids=frozenset({1}),
            adapter_sha256=str,
            write_adapter=lambda folder: None,
        )
    assert refused.value.code == "no_vllm"
