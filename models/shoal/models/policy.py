"""A policy: a base model and the weights that change and travel.

With a LoRA spec these are an adapter's, and the base stays frozen; without one they are all
weights of the base, each once, whatever modules share it.  "Adapter" in a name below means
the weights that travel, whichever they are.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray

from shoal.models.base import is_hub_id, load_model, load_tokenizer, share_weights
from shoal.models.engine import LoopEngine, SamplingEngine
from shoal.models.forward import Tokens, completion_logits_btv
from shoal.models.llama import LlamaForward
from shoal.models.scoring import completion_logprobs_bt
from shoal.protocol.canonical import sha256_hex
from shoal.protocol.errors import InvalidRequest, InvariantBroken, PeerFault
from shoal.protocol.ids import Digest
from shoal.protocol.learning import LoraSpec

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MAX_REMEMBERED_TOKENS = 1 << 20
"""Prompts are kept encoded up to about so many tokens, judged by the lengths of the last ones."""
_HEADER_ALLOWANCE_BYTES = 1 << 20
_WIRE_INFIX = ".default"
"""PEFT's name for the one adapter inside a model; left out of the names in its files."""


class Policy:
    """A base with one adapter, ready to sample from and to differentiate.

    Args:
        model: The model, with PEFT's modules in it if there is a LoRA spec.
        tokenizer: The base's tokenizer.
        lora: The adapter's shape; None trains every weight.
        device: Where the model lies.
        folder: The base's files, which the reference of full fine-tuning is read from.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        lora: LoraSpec | None,
        device: torch.device,
        folder: Path | None = None,
    ) -> None:
        self._folder = folder
        self._untrained: Any = None
        self.model = model
        self.tokenizer = tokenizer
        self._encoded: dict[str, list[int]] = {}
        self.lora = lora
        self.device = device
        self.eos_ids = _eos_ids(model, tokenizer)
        self.vocab_size = int(model.config.vocab_size)
        self._forward = LlamaForward.of(model)
        self.engine: SamplingEngine = LoopEngine(model, self._forward, self.eos_ids, device)
        self._parameters = {
            (name if lora is None else _wire_name(name)): parameter
            for name, parameter in sorted(model.named_parameters())
            if parameter.requires_grad
        }

    @classmethod
    def load(
        cls,
        folder: Path,
        lora: LoraSpec | None,
        *,
        seed: int,
        device: str = "cpu",
        base: Any = None,
    ) -> Policy:
        """The base in ``folder`` with version 0 of a job's adapter, which changes nothing yet.

        Without ``lora`` every weight of the base is trainable, in fp32; version 0 is the base.
        With one the weights of ``base``, the folder's model loaded before, are used and not
        copied, so that any number of policies share them; absent, they are loaded.

        Raises:
            InvalidRequest: the folder does not load, or has no module the spec targets.
        """
        tokenizer = load_tokenizer(folder)
        if lora is None:
            base = load_model(folder)
            return cls(
                base.requires_grad_(True).to(device), tokenizer, None, torch.device(device), folder
            )
        base = load_model(folder) if base is None else share_weights(base)
        policy = cls(_with_lora(base, lora).to(device), tokenizer, lora, torch.device(device))
        policy._initialise(seed)
        return policy

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that change, by their names in files, in order of name.

        A weight that several modules share stands once, under the first of its names.
        """
        return dict(self._parameters)

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The adapter's values, copied."""
        return {
            name: parameter.detach().cpu().numpy().astype(np.float32, copy=True)
            for name, parameter in self._parameters.items()
        }

    def adapter_bytes(self) -> bytes:
        """The adapter as a stock safetensors file; equal weights give equal bytes."""
        return safetensors.numpy.save(self.arrays(), metadata={"format": "pt"})

    def adapter_sha256(self) -> Digest:
        """Digest of `adapter_bytes`: which weights this policy holds now."""
        return sha256_hex(self.adapter_bytes())

    def load_adapter(self, data: bytes) -> None:
        """Replaces the adapter by the one in ``data``, or changes nothing.

        Raises:
            PeerFault: too large, not safetensors, or names, shapes, types or values differ
                from those of an fp32 adapter of this policy's shape.
        """
        arrays = decode_arrays(data, self.shapes(), what="adapter")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.from_numpy(arrays[name]))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each adapter array."""
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def encode_prompt(self, text: str) -> list[int]:
        """``text`` as tokens, with whatever start token the tokenizer adds.

        Raises:
            InvalidRequest: the text gives no tokens.
        """
        return self.encode_prompts([text])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_prompt` of each text, in one pass.

        Raises:
            InvalidRequest: a text gives no tokens.
        """
        # The same prompts come back in every batch, to be sampled and to be checked.
        new = [text for text in dict.fromkeys(texts) if text not in self._encoded]
        if new:
            rows = dict(zip(new, self.tokenizer(new)["input_ids"], strict=True))
            if not all(rows.values()):
                raise InvalidRequest("A prompt is empty; every prompt needs at least one token.")
            self._encoded |= rows
        found = [list(self._encoded[text]) for text in texts]
        if sum(map(len, found)) * len(self._encoded) > MAX_REMEMBERED_TOKENS * len(found):
            self._encoded.clear()
        return found

    def decode_completion(self, tokens: Sequence[int]) -> str:
        """The text of a completion, without special tokens."""
        ids = [int(token) for token in tokens]
        tokenizer = self.tokenizer
        if tokenizer.is_fast and not tokenizer.clean_up_tokenization_spaces:
            # What the tokenizer itself would do, without its wrapping, which costs four times it.
            return str(tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True))
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def logits_btv(self, prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> torch.Tensor:
        """Teacher-forced fp32 logits of each completion position (see `shoal.models.forward`)."""
        return completion_logits_btv(self.model, prompts, completions, self.device)

    def logprobs_bt(
        self, prompts: Sequence[Tokens], completions: Sequence[Tokens], temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, differentiable, and entropies (see `shoal.models.scoring`)."""
        forward = None if self.model is self._untrained else self._forward
        return completion_logprobs_bt(
            self.model, forward, prompts, completions, temperature, self.device
        )

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """While it lasts the policy is the untrained base, for KL terms; not to be trained."""
        if self.lora is not None:
            with self.model.disable_adapter():
                yield
            return
        if self._untrained is None:
            if self._folder is None:
                raise InvariantBroken("A fully trained policy has no folder to read its base from.")
            self._untrained = load_model(self._folder).requires_grad_(False).to(self.device)
        trained, self.model = self.model, self._untrained
        try:
            yield
        finally:
            self.model = trained

    def save_folder(self, directory: Path, base_name: str, base_sha256: str, card: str) -> None:
        """``directory`` holds the release: a stock PEFT adapter, or else a whole model.

        Configuration, weights, tokenizer and card, as ``peft`` or ``transformers`` load them.
        """
        directory.mkdir(parents=True, exist_ok=True)
        if self.lora is None:
            self.model.save_pretrained(directory)
        else:
            self.save_adapter(directory, base_name, base_sha256)
        self.tokenizer.save_pretrained(directory)
        (directory / "README.md").write_text(card, encoding="utf-8")

    def save_adapter(self, directory: Path, base_name: str, base_sha256: str) -> None:
        """``directory`` holds a stock PEFT adapter: its configuration and its weights."""
        directory.mkdir(parents=True, exist_ok=True)
        config = dict(self.model.peft_config["default"].to_dict())
        config["target_modules"] = sorted(config["target_modules"])
        config["base_model_name_or_path"] = base_name
        # A hub id is followed by PEFT with this revision, which must then be a git one.
        config["revision"] = None if is_hub_id(base_name) else base_sha256
        config["inference_mode"] = True
        (directory / CONFIG_FILE).write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        (directory / ADAPTER_FILE).write_bytes(self.adapter_bytes())

    def _initialise(self, seed: int) -> None:
        """Kaiming-uniform ``A`` from the seed and zero ``B``, equal on every machine.

        Source: LoRA (arXiv 2106.09685) §4.1, PEFT's default bound ``1/√fan_in``.
        """
        with torch.no_grad():
            for number, (name, parameter) in enumerate(self._parameters.items()):
                if ".lora_A." in name or ".lora_embedding_A" in name:
                    key = np.array([seed, number], dtype=np.uint64)
                    draw = np.random.Generator(np.random.Philox(key=key)).random(parameter.shape)
                    bound = parameter.shape[1] ** -0.5
                    parameter.copy_(torch.from_numpy((2.0 * draw - 1.0) * bound))
                elif ".lora_B." in name or ".lora_embedding_B" in name:
                    parameter.zero_()
                else:
                    raise InvariantBroken(f"{name} is trainable but no LoRA matrix.")


def _with_lora(base: Any, lora: LoraSpec) -> Any:
    """``base`` with PEFT's modules in it.

    Raises:
        InvalidRequest: it has no module the spec targets.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=_target_modules(lora),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=False,
    )
    try:
        with warnings.catch_warnings():
            # PEFT reads a name transformers is about to retire; nothing of ours can mend it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            model = get_peft_model(base, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise InvalidRequest(
            f"lora.target_modules {lora.target_modules!r} does not fit the model: "
            f"{str(error).splitlines()[0][:200]}",
            code="bad_lora",
        ) from error
    return model.eval()


def decode_arrays(
    data: bytes, shapes: Mapping[str, tuple[int, ...]], *, what: str
) -> dict[str, NDArray[np.float32]]:
    """Exactly the finite fp32 arrays ``shapes`` asks for, from bytes a stranger sent.

    Raises:
        PeerFault: the bytes are anything else; ``what`` names them in the message.
    """
    limit = sum(4 * math.prod(shape) for shape in shapes.values()) + _HEADER_ALLOWANCE_BYTES
    if len(data) > limit:
        raise _fault(data[:0], what, f"is {len(data)} bytes where at most {limit} fit", "oversize")
    try:
        arrays = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, AttributeError):
        raise _fault(data, what, "is not a safetensors file") from None
    if arrays.keys() != shapes.keys():
        odd = sorted(arrays.keys() ^ shapes.keys())[0][:100]
        raise _fault(data, what, f"has missing or unknown arrays, first {odd!r}")
    for name, shape in shapes.items():
        array = arrays[name]
        if array.dtype != np.float32 or array.shape != shape:
            found = f"{array.dtype}{list(array.shape)}"
            raise _fault(data, what, f"has {name!r} as {found}, not float32{list(shape)}")
        if not np.isfinite(array).all():
            raise _fault(data, what, f"has values in {name!r} that are not finite", "not_finite")
    return arrays


def _fault(data: bytes, what: str, why: str, code: str = "malformed") -> PeerFault:
    return PeerFault(f"The {what} {why}.", code=code, evidence=sha256_hex(data) if data else "")


def _wire_name(name: str) -> str:
    return name.replace(_WIRE_INFIX, "", 1)


def _target_modules(lora: LoraSpec) -> str | list[str]:
    if lora.target_modules == "all-linear":
        return "all-linear"
    return lora.target_modules.split("|")


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for source in (generation, model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    if not found:
        raise InvalidRequest(
            "The model has no end-of-sequence token; set eos_token_id in its config.json.",
            code="unloadable_model",
        )
    return frozenset(found)
