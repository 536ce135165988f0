"""A `vllm` package small enough for tests: it samples as vLLM does, by logits processors.

It stands for what vLLM does around `shoal.models.vllm_engine`: loads the base from its folder
and each adapter as stock PEFT does, asks the processors before it draws, and draws the
likeliest of what they leave.  Rows are run one by one.
"""

from __future__ import annotations

import sys
import types
import warnings
from typing import Any, ClassVar

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

DRAWN_AT_MOST = 64
_INTERFACE = "vllm.v1.worker.gpu.sample.logits_processor.interface"


class LogitsProcessor:
    """The class vLLM's processors are made of."""


class SamplingParams(types.SimpleNamespace):
    """What `LLM.generate` is given for each row."""


class LoRARequest:
    """The handle of an adapter in a folder."""

    def __init__(self, name: str, number: int, path: str) -> None:
        self.number, self.path = number, path


class LLM:
    """The engine; ``built`` are all that were made, ``loaded`` the adapters one was given."""

    built: ClassVar[list[LLM]]
    obeys = True

    def __init__(self, **settings: Any) -> None:
        self.settings, self.loaded = settings, list[int]()
        self.steps = 0
        self._adapters: dict[int, Any] = {}
        self.llm_engine: Any = types.SimpleNamespace(
            model_config=types.SimpleNamespace(hf_config=self._base().config)
        )
        (processor,) = settings["logits_processors"]
        self._processor = processor(None, None)
        self.built.append(self)

    def _base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.settings["model"], dtype=torch.float32)

    def _model(self, request: LoRARequest) -> Any:
        if request.number not in self._adapters:
            self.loaded.append(request.number)
            with warnings.catch_warnings():
                # PEFT reads a name transformers is about to retire.
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                model = peft.PeftModel.from_pretrained(self._base(), request.path)
            self._adapters[request.number] = model
        return self._adapters[request.number]

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        parameters: list[SamplingParams],
        *,
        use_tqdm: bool,
        lora_request: LoRARequest,
    ) -> list[Any]:
        model = self._model(lora_request)
        outputs = []
        for prompt, wanted in zip(prompts, parameters, strict=True):
            tokens = self._complete(model, prompt["prompt_token_ids"], wanted)
            output = types.SimpleNamespace(token_ids=tokens)
            outputs.append(types.SimpleNamespace(outputs=[output]))
        return outputs

    def _complete(self, model: Any, prompt: list[int], wanted: SamplingParams) -> list[int]:
        self._processor.add_request(0, wanted)
        tokens: list[int] = []
        while len(tokens) < min(wanted.max_tokens, DRAWN_AT_MOST):
            self.steps += 1
            row = [*prompt, *tokens]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[:, -1]
            place = types.SimpleNamespace(
                expanded_idx_mapping=torch.tensor([0]), pos=torch.tensor([len(row) - 1])
            )
            left = self._processor.apply(logits.clone(), place)
            tokens.append(int((left if self.obeys else logits).argmax()))
            if tokens[-1] in wanted.stop_token_ids:
                break
        return tokens


def install(patch: pytest.MonkeyPatch) -> type[LLM]:
    """``import vllm`` gives this package; returns its `LLM`, of which none is built yet."""

    class Fresh(LLM):
        built: ClassVar[list[LLM]] = []

    parts = _INTERFACE.split(".")
    names = [".".join(parts[: count + 1]) for count in range(len(parts))]
    modules = {name: types.ModuleType(name) for name in (*names, "vllm.lora", "vllm.lora.request")}
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": Fresh, "SamplingParams": SamplingParams},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        _INTERFACE: {"LogitsProcessor": LogitsProcessor},
    }
    for name, module in modules.items():
        vars(module).update(contents.get(name, {}))
        patch.setitem(sys.modules, name, module)
    patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return Fresh
