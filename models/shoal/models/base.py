"""Base models on disk: found by name, described by content, loaded without running their code."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from shoal.protocol.blob import BlobRef
from shoal.protocol.errors import InvalidRequest, PeerFault, ShoalError, Unavailable
from shoal.protocol.policy import BaseModelRef, ModelFile

CONFIG_FILE = "config.json"
ALLOWED_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "model.safetensors.index.json",
    "*.safetensors",
)
"""What is read of a model folder.  Pickled weights and Python files are never fetched."""

_PARTS: Final = (
    "num_hidden_layers",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "n_shared_experts",
)
"""What a configuration counts modules by."""
_MAX_SCRATCH: Final = 1 << 26
"""Of masks and tables that a small model makes for itself."""

_SAFETENSORS = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\.safetensors$")


def resolve_base(name: str, cache_dir: Path, *, allow_local: bool) -> Path:
    """The folder that holds the model ``name``: a local path, or a hub id fetched to ``cache_dir``.

    Raises:
        InvalidRequest: code ``unreachable_model`` when there is no such model, it holds no
            safetensors weights, or the hub does not answer.
    """
    if not is_hub_id(name):
        folder = Path(name).expanduser()
        if not allow_local:
            raise _unreachable(name, "this orchestrator reads no local paths; give a hub id")
        if not folder.is_dir():
            raise _unreachable(name, "there is no such folder; check the path")
    else:
        folder = _fetch(name, cache_dir)
    if not (folder / CONFIG_FILE).is_file() or not any(folder.glob("*.safetensors")):
        raise _unreachable(
            name, "it holds no config.json with safetensors weights; convert it to safetensors"
        )
    return folder


def is_hub_id(name: str) -> bool:
    """Whether ``name`` is neither a path nor a built-in model."""
    return not name.startswith((".", "~", "/", "builtin:"))


def describe_base(name: str, folder: Path, make_blob: Callable[[Path], BlobRef]) -> BaseModelRef:
    """The content of ``folder`` as a record; ``make_blob`` stores one file and names it."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and _is_allowed(path.name))
    return BaseModelRef(
        name=name,
        files=tuple(ModelFile(path=path.name, blob=make_blob(path)) for path in files),
        num_parameters=sum(
            math.prod(shape)
            for path in files
            if path.suffix == ".safetensors"
            for shape in _shapes(path)
        ),
    )


def require_allowed_files(base: BaseModelRef) -> None:
    """Passes only if ``base`` names nothing but configuration, tokenizer and safetensors.

    Raises:
        PeerFault: another kind of file, a name twice, or no configuration.
    """
    names = [file.path for file in base.files]
    stranger = next((name for name in names if not _is_allowed(name)), None)
    if stranger is not None or len(set(names)) != len(names) or CONFIG_FILE not in names:
        raise PeerFault(
            f"The base model {base.name} lists {stranger or 'no or repeated'} files where only "
            "one config.json, tokenizer files and safetensors are allowed.",
            code="malformed_base",
        )


def load_model(folder: Path) -> Any:
    """The causal language model in ``folder``, fp32, evaluation mode, on the CPU.

    Raises:
        InvalidRequest: the folder is not a model ``transformers`` can load without running
            code from it, or lacks some of the model's tensors.
        Unavailable: it does not fit into memory (code ``out_of_memory``).
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    require_complete(folder)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="float32",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # a stranger's files make the libraries raise anything
        raise _unloadable(folder, error) from error
    model, loaded = found
    missing = sorted(loaded["missing_keys"])
    if missing:
        # The library fills them at random: each process would hold another model.
        raise _unloadable(folder, ValueError(f"its files lack {', '.join(missing[:3])}"))
    return model.eval()


def require_complete(folder: Path) -> None:
    """Passes if the folder's files hold as much as the model that its configuration describes.

    Nothing of that size is allocated to find out: a few bytes of configuration may describe a
    model of any size, which a library would make and fill.

    Raises:
        InvalidRequest: they hold less, or the configuration describes no model that loads.
        Unavailable: looking took more memory than there is.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes = [shape for path in folder.glob("*.safetensors") for shape in _shapes(path)]
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for part in _PARTS:
            # A module for each of them is made even where no tensor is.
            if getattr(config, part, 0) > len(shapes):
                raise ValueError(f"{part} is {getattr(config, part)} for {len(shapes)} tensors")
        with torch.device("meta"):
            models: Any = AutoModelForCausalLM
            model = models.from_config(config, trust_remote_code=False)
        needed, held = sum(p.numel() for p in model.parameters()), sum(map(math.prod, shapes))
        if needed > held:
            raise ValueError(
                f"its configuration describes {needed} parameters of which its files hold {held}"
            )
        scratch = sum(buffer.numel() for buffer in model.buffers())
        if scratch > held + _MAX_SCRATCH:
            raise ValueError(f"it would make buffers of {scratch} numbers for {held} parameters")
    except Exception as error:  # as above
        raise _unloadable(folder, error) from error


def share_weights(model: Any) -> Any:
    """A second model over the same parameters and buffers; what is added to it is its own."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    # To `deepcopy` what is in its memo is copied already: only the modules are.
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``.

    Raises:
        InvalidRequest: there is none that loads without running code from the folder.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise _unloadable(folder, error) from error


def _fetch(name: str, cache_dir: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, cache_dir=cache_dir, allow_patterns=list(ALLOWED_FILES))
        )
    except HFValidationError:
        raise _unreachable(name, "it is neither a built-in name nor a hub id") from None
    except LocalEntryNotFoundError:
        raise _unreachable(
            name, "the model hub does not answer and no copy is cached; check the network"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise _unreachable(name, f"the model hub refused it ({type(error).__name__})") from error


def _is_allowed(name: str) -> bool:
    return name in ALLOWED_FILES or _SAFETENSORS.match(name) is not None


def _shapes(path: Path) -> list[tuple[int, ...]]:
    """The shape of each tensor in the file, none of which is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as arrays:
            return [tuple(arrays.get_slice(key).get_shape()) for key in arrays.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unloadable(path.parent, error) from error


def _unreachable(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The model {name!r} cannot be used: {why}.", code="unreachable_model", model=name
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on whatever device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # The CPU's allocator has no error class of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _unloadable(folder: Path, error: Exception) -> ShoalError:
    if is_out_of_memory(error):
        # The machine's fault and not the model's: another one may hold it.
        return Unavailable(
            f"The model in {folder.name} does not fit into this machine's memory; use a "
            "machine with more.",
            code="out_of_memory",
        )
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no reason given"
    return InvalidRequest(
        f"The model folder {folder.name} does not load as a causal language model: {reason}.",
        code="unloadable_model",
    )
