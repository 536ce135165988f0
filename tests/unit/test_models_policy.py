"""A policy samples, differentiates, saves and refuses as it promises."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from learning_fixtures import Lab, stir, write_base
from safetensors.numpy import load_file, save_file

from shoal.models import base as base_module
from shoal.models.base import (
    describe_base,
    require_allowed_files,
    require_complete,
    resolve_base,
)
from shoal.models.policy import Policy
from shoal.models.sampling import draw_uniforms_bt, select_tokens_b
from shoal.protocol.errors import InvalidRequest, PeerFault, Unavailable
from shoal.protocol.learning import LoraSpec
from shoal.rl.local import blob_of_file


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab.open(write_base(tmp_path_factory.mktemp("base")))


def prompts_of(policy: Policy) -> list[list[int]]:
    """Prompts of three lengths, so that padding matters, four rows each."""
    return [policy.encode_prompt(t) for t in ("47+38=", "1+2=", "123+456=") for _ in range(4)]


def test_tokenizer_round_trips_text(lab: Lab) -> None:
    tokens = lab.policy.encode_prompt("47+38=")
    assert len(tokens) == 6
    assert lab.policy.decode_completion([*tokens, *lab.policy.eos_ids]) == "47+38="


def test_empty_prompt_is_refused(lab: Lab) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        lab.policy.encode_prompt("")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_an_unbatched_forced_pass(lab: Lab, temperature: float) -> None:
    prompts = prompts_of(lab.policy)
    uniforms = draw_uniforms_bt(7, range(len(prompts)), 12)
    drawn = lab.policy.engine.generate(
        prompts, max_tokens=12, temperature=temperature, uniforms_bt=uniforms
    )
    with torch.inference_mode():
        for prompt, tokens, logprobs in zip(prompts, drawn.token_ids, drawn.logprobs, strict=True):
            row = torch.tensor([[*prompt, *tokens.tolist()]])
            logits = lab.policy.model(input_ids=row).logits[0, len(prompt) - 1 : -1]
            forced = torch.log_softmax(logits / temperature, dim=-1).gather(
                1, row[0, len(prompt) :, None]
            )
            assert np.abs(forced[:, 0].numpy() - logprobs).max() < 3e-5


def test_rows_do_not_depend_on_their_neighbours(lab: Lab) -> None:
    prompts = prompts_of(lab.policy)
    uniforms = draw_uniforms_bt(7, range(len(prompts)), 8)
    together = lab.policy.engine.generate(
        prompts, max_tokens=8, temperature=1.0, uniforms_bt=uniforms
    )
    alone = lab.policy.engine.generate(
        prompts[5:6], max_tokens=8, temperature=1.0, uniforms_bt=uniforms[5:6]
    )
    assert alone.token_ids[0].tolist() == together.token_ids[5].tolist()


def test_rows_end_at_the_first_end_token(lab: Lab) -> None:
    prompts = prompts_of(lab.policy) * 4
    uniforms = draw_uniforms_bt(3, range(len(prompts)), 40)
    drawn = lab.policy.engine.generate(
        prompts, max_tokens=40, temperature=1.5, uniforms_bt=uniforms
    )
    (eos,) = lab.policy.eos_ids
    assert 0 < drawn.finished.sum() < len(prompts)
    for tokens, finished in zip(drawn.token_ids, drawn.finished, strict=True):
        assert eos not in tokens[:-1]
        assert finished == (tokens[-1] == eos)
        assert finished or len(tokens) == 40


def test_greedy_takes_the_likeliest_token(lab: Lab) -> None:
    prompt = lab.policy.encode_prompt("12+34=")
    drawn = lab.policy.engine.generate([prompt], max_tokens=3, temperature=1.0, uniforms_bt=None)
    with torch.inference_mode():
        logits = lab.policy.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    assert drawn.token_ids[0][0] == int(logits.argmax())


def test_uniforms_of_a_row_need_no_other_row() -> None:
    few, many = draw_uniforms_bt(5, range(2), 4), draw_uniforms_bt(5, range(9), 4)
    assert np.array_equal(few, many[:2])
    assert not np.array_equal(many[0], many[1])
    assert not np.array_equal(many, draw_uniforms_bt(6, range(9), 4))


def test_selection_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.3])
    logprobs = probabilities.log().expand(5, 4)
    chosen = select_tokens_b(logprobs, torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 1 - 1e-9]))
    assert chosen.tolist() == [0, 0, 2, 2, 3]


def test_version_zero_is_the_base_and_the_same_everywhere(lab: Lab) -> None:
    first = Policy.load(lab.folder, LoraSpec(r=4), seed=9)
    again = Policy.load(lab.folder, LoraSpec(r=4), seed=9)
    other = Policy.load(lab.folder, LoraSpec(r=4), seed=10)
    assert first.adapter_bytes() == again.adapter_bytes()
    assert first.adapter_bytes() != other.adapter_bytes()
    row = torch.tensor([first.encode_prompt("12+34=")])
    with torch.inference_mode():
        adapted = first.model(input_ids=row).logits
        with first.model.disable_adapter():
            assert torch.equal(adapted, first.model(input_ids=row).logits)


def test_adapter_travels_whole(lab: Lab) -> None:
    other = Policy.load(lab.folder, lab.policy.lora, seed=5)
    assert other.adapter_sha256() != lab.policy.adapter_sha256()
    other.load_adapter(lab.policy.adapter_bytes())
    assert other.adapter_sha256() == lab.policy.adapter_sha256()


def _missing(arrays: dict[str, np.ndarray], name: str) -> None:
    del arrays[name]


def _misshapen(arrays: dict[str, np.ndarray], name: str) -> None:
    arrays[name] = arrays[name][:, :1].copy()


def _wrong_dtype(arrays: dict[str, np.ndarray], name: str) -> None:
    arrays[name] = arrays[name].astype(np.float16)


def _not_finite(arrays: dict[str, np.ndarray], name: str) -> None:
    arrays[name][0, 0] = math.nan


@pytest.mark.parametrize("damage", [_missing, _misshapen, _wrong_dtype, _not_finite])
def test_a_bad_adapter_is_refused_and_changes_nothing(lab: Lab, damage: object) -> None:
    arrays = lab.policy.arrays()
    held = lab.policy.adapter_sha256()
    damage(arrays, next(iter(arrays)))  # type: ignore[operator]
    with pytest.raises(PeerFault):
        lab.policy.load_adapter(safetensors.numpy.save(arrays))
    assert lab.policy.adapter_sha256() == held


@pytest.mark.parametrize("data", [b"", b"junk", b"\xff" * 64, b"\0" * (4 << 20)])
def test_bytes_that_are_no_adapter_are_refused(lab: Lab, data: bytes) -> None:
    with pytest.raises(PeerFault):
        lab.policy.load_adapter(data)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_saved_folder_opens_with_stock_peft(lab: Lab, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lab.policy.save_folder(tmp_path, "builtin:tiny", "0" * 64, "# A card\n")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "builtin:tiny"
    assert config["revision"] == "0" * 64
    assert config["target_modules"] == sorted(config["target_modules"])
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(lab.folder), tmp_path
    ).eval()
    row = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("12+34=")["input_ids"]])
    with torch.inference_mode():
        assert torch.equal(stock(input_ids=row).logits, lab.policy.model(input_ids=row).logits)
        with lab.policy.model.disable_adapter():
            assert not torch.equal(
                stock(input_ids=row).logits, lab.policy.model(input_ids=row).logits
            )


def test_unknown_target_modules_are_named(lab: Lab) -> None:
    with pytest.raises(InvalidRequest, match="no_such_proj"):
        Policy.load(lab.folder, LoraSpec(target_modules="no_such_proj"), seed=0)


def test_base_is_described_by_its_content(lab: Lab) -> None:
    (lab.folder / "run_me.py").write_text("raise SystemExit")
    ref = describe_base("m", lab.folder, blob_of_file)
    names = [file.path for file in ref.files]
    assert "config.json" in names
    assert "run_me.py" not in names
    assert ref.num_parameters == sum(
        p.numel() for n, p in lab.policy.model.named_parameters() if not p.requires_grad
    )
    require_allowed_files(ref)


@pytest.mark.parametrize("path", ["weights.bin", "modeling.py", "pytorch_model.pt"])
def test_a_base_with_other_files_is_refused(lab: Lab, path: str) -> None:
    ref = lab.plan.base
    odd = ref.files[0].model_copy(update={"path": path})
    with pytest.raises(PeerFault, match="only"):
        require_allowed_files(ref.model_copy(update={"files": (*ref.files, odd)}))


def test_local_paths_need_permission(lab: Lab, tmp_path: Path) -> None:
    assert resolve_base(str(lab.folder), tmp_path, allow_local=True) == lab.folder
    with pytest.raises(InvalidRequest, match="no local paths") as refused:
        resolve_base(str(lab.folder), tmp_path, allow_local=False)
    assert refused.value.code == "unreachable_model"


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere"])
def test_a_missing_folder_is_unreachable(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve_base(name, tmp_path, allow_local=True)
    assert refused.value.code == "unreachable_model"


def test_a_folder_without_safetensors_is_unreachable(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InvalidRequest, match="safetensors"):
        resolve_base(str(tmp_path), tmp_path, allow_local=True)


def _edit(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = folder / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))

    return edit


def _without_end(folder: Path) -> None:
    for path in folder.glob("*config.json"):
        held = json.loads(path.read_text())
        kept = {name: value for name, value in held.items() if not name.startswith("eos_token")}
        path.write_text(json.dumps(kept))
    _edit(eos_token_id=None)(folder)


def _write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: _drop((folder / name).write_bytes(data))


def _drop(_: object) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without_end, "no end-of-sequence token"),
        (_write("model.safetensors", b""), "header"),
        (_write("model.safetensors", b"\xff" * 64), "header"),
        (_write("config.json", b"[]"), "does not load"),
        (_edit(hidden_size="wide"), "hidden_size"),
        (_edit(num_attention_heads=0), "does not load"),
        (_write("tokenizer.json", b"[1]"), "does not load"),
        (_write("tokenizer_config.json", b"[1]"), "does not load"),
    ],
)
def test_whatever_is_wrong_with_a_bases_files_is_one_sentence(
    lab: Lab, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    folder = Path(shutil.copytree(lab.folder, tmp_path / "base"))
    assert Policy.load(folder, lab.policy.lora, seed=0).eos_ids == lab.policy.eos_ids
    damage(folder)
    with pytest.raises(InvalidRequest, match=said) as refused:
        Policy.load(folder, lab.policy.lora, seed=0)
    assert refused.value.code == "unloadable_model"
    assert "\n" not in refused.value.message


def test_weights_that_lack_a_tensor_are_refused_and_not_made_up(lab: Lab, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(lab.folder, tmp_path / "base"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    # As many numbers as before, so that only their names tell.
    weights["of.another.model"] = weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidRequest, match=f"its files lack .*{name}") as refused:
        Policy.load(folder, lab.policy.lora, seed=0)
    assert refused.value.code == "unloadable_model"


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"hidden_size": 1 << 20}, "of which its files hold"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"model_type": "gpt2", "max_position_embeddings": 1 << 20}, "of which its files hold"),
    ],
)
def test_a_model_larger_than_its_files_is_never_made(
    lab: Lab, tmp_path: Path, described: dict[str, object], said: str
) -> None:
    folder = Path(shutil.copytree(lab.folder, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | described))
    with pytest.raises(InvalidRequest, match=said):
        require_complete(folder)
    with pytest.raises(InvalidRequest, match=said):
        Policy.load(folder, lab.policy.lora, seed=0)


def test_nesting_without_end_is_an_error_and_no_crash(lab: Lab, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(lab.folder, tmp_path / "base"))
    (folder / "config.json").write_text("[" * 200_000)
    # In a process of its own, which a stack that overflows would end.
    script = (
        "import sys, web3, eth_account; from pathlib import Path; import shoal.orchestrator.main;"
        "from shoal.models.base import load_model; from shoal.protocol.errors import ShoalError\n"
        "try: load_model(Path(sys.argv[1]))\n"
        "except ShoalError as error: print(error.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "unloadable_model"), done.stderr


def test_weights_that_cannot_be_counted_are_one_sentence(lab: Lab, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(lab.folder, tmp_path / "base"))
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(InvalidRequest, match="does not load") as refused:
        describe_base("a base", folder, blob_of_file)
    assert refused.value.code == "unloadable_model"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_base_too_large_for_this_machine_is_not_called_broken(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def allocate(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", allocate)
    with pytest.raises(Unavailable, match="does not fit") as refused:
        Policy.load(lab.folder, lab.policy.lora, seed=0)
    assert refused.value.code == "out_of_memory"


def test_a_silent_hub_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidRequest) as refused:
        resolve_base("nobody/nothing", tmp_path, allow_local=False)
    assert refused.value.code == "unreachable_model"
    assert base_module.is_hub_id("nobody/nothing")


def test_stirring_changes_what_is_said(lab: Lab) -> None:
    calm = Policy.load(lab.folder, lab.policy.lora, seed=0)
    before = calm.adapter_sha256()
    stir(calm)
    assert calm.adapter_sha256() != before


def test_prompts_met_again_are_encoded_alike_and_memory_stays_bounded(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = lab.policy
    first = policy.encode_prompts(["1+2=", "3+4=", "1+2="])
    assert first[0] == first[2] != first[1]
    # What a caller does to its copy is its own business.
    first[0].append(0)
    assert policy.encode_prompts(["1+2="]) == [first[2]]
    monkeypatch.setattr("shoal.models.policy.MAX_REMEMBERED_TOKENS", 64)
    for number in range(100):
        policy.encode_prompts([f"{number}+2="])
        assert len(policy._encoded) <= 64
