"""What the model would run on: what torch sees, and what the driver's own tool sees."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
from typing import Any, Final

from pydantic import ValidationError

from shoal.protocol.record import Record
from shoal.worker.config import Device, WorkerConfig
from shoal.worker.doctor.report import Finding, fail, ok, size, warn

_ASK_TORCH: Final = """
import json, torch
seen = {"version": torch.__version__, "cuda": torch.version.cuda or torch.version.hip,
        "threads": torch.get_num_threads(), "gpus": [],
        "mps": torch.backends.mps.is_available(), "problem": None}
try:
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        seen["gpus"].append({"name": device.name, "memory_bytes": device.total_memory})
    if seen["gpus"]:
        float(torch.ones(2, device="cuda").sum())
except Exception as error:
    seen["problem"] = f"{type(error).__name__}: {error}"[:300]
print(json.dumps(seen))
"""
"""Run in a process of its own: a driver that hangs takes nothing else with it."""
_ASK_DRIVER: Final = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total",
    "--format=csv,noheader,nounits",
)
_DRIVER_S: Final = 8.0
_TORCH_S: Final = 20.0
_END_S: Final = 1.0
_MAX_OUTPUT_BYTES: Final = 64 << 10
_GOOD_GPU_BYTES: Final = 4 << 30


class Gpu(Record):
    """A GPU that torch sees."""

    name: str
    memory_bytes: int


class TorchView(Record):
    """What torch says of itself and of the machine.

    ``cuda`` is the toolkit it was built for, absent in a build for processors alone.
    ``problem`` is why a GPU that is there did not compute.
    """

    version: str
    cuda: str | None
    threads: int
    gpus: tuple[Gpu, ...]
    mps: bool
    problem: str | None


class DriverView(Record):
    """What ``nvidia-smi`` says: its GPUs and their driver, or what its ``problem`` is.

    All are absent where there is no such tool.
    """

    gpus: tuple[str, ...] = ()
    driver: str | None = None
    problem: str | None = None


async def look_at_compute(config: WorkerConfig) -> list[Finding]:
    """What the model would run on."""
    torch_view, driver = await asyncio.gather(_ask_torch(), _ask_driver())
    if isinstance(torch_view, Finding):
        return [torch_view]
    return [judge_torch(torch_view), judge_device(config.device, torch_view, driver)]


def judge_torch(view: TorchView) -> Finding:
    """What is to be said of torch itself."""
    build = f"for CUDA or ROCm {view.cuda}" if view.cuda else "for processors alone"
    return ok("torch", "torch", f"{view.version} {build}, {view.threads} threads by default")


def judge_device(device: Device, view: TorchView, driver: DriverView) -> Finding:
    """What the model would run on, and why not on something better."""
    if view.gpus and view.problem is None:
        return _judge_gpus(view, driver)
    if device is Device.MPS or (device is Device.AUTO and view.mps):
        if view.mps:
            return ok("device", "device", "mps (Apple GPU)")
        return fail("device", "device", "torch sees no Apple GPU", "set device to auto or cpu")
    if device is Device.CPU:
        return ok("device", "device", "cpu, as set")
    why, mend = _why_no_gpu(view, driver)
    if device is Device.CUDA:
        return fail("device", "device", f"cuda is set and {why}", mend or "set device to auto")
    if mend:
        return warn("device", "device", f"cpu: {why}", mend)
    return ok("device", "device", f"cpu: {why}")


def _judge_gpus(view: TorchView, driver: DriverView) -> Finding:
    names = ", ".join(f"{gpu.name} with {size(gpu.memory_bytes)}" for gpu in view.gpus)
    measured = names if driver.driver is None else f"{names}, driver {driver.driver}"
    if min(gpu.memory_bytes for gpu in view.gpus) < _GOOD_GPU_BYTES:
        return warn("device", "device", measured, "only small models fit; lower capacity.*")
    if len(view.gpus) > 1:
        return warn(
            "device",
            "device",
            measured,
            "one worker uses one of them: start it with --ray to use all",
        )
    return ok("device", "device", measured)


def _why_no_gpu(view: TorchView, driver: DriverView) -> tuple[str, str]:
    """Why torch has no GPU, and the mend; no mend where there is none to have."""
    if view.problem is not None and view.gpus:
        return (
            f"the GPU does not compute ({view.problem})",
            "update the driver, or install the torch build for this GPU from pytorch.org",
        )
    if driver.gpus:
        there = f"torch does not see the {driver.gpus[0]} that nvidia-smi shows"
        if view.cuda is None:
            return f"{there}: this torch is built for processors alone", (
                "install the CUDA build of torch from pytorch.org"
            )
        return f"{there}: driver {driver.driver}, torch for CUDA {view.cuda}", (
            f"update the driver to one for CUDA {view.cuda}, or install torch for an older CUDA; "
            "in a container, start it with its GPUs (--gpus all)"
        )
    if driver.problem is not None:
        return (
            f"nvidia-smi fails ({driver.problem})",
            "restart the machine or install the driver anew",
        )
    return "no GPU seen", ""


async def _ask_torch() -> TorchView | Finding:
    code, output, errors = await _run(_TORCH_S, sys.executable, "-c", _ASK_TORCH)
    if code is None:
        return fail(
            "torch",
            "torch",
            f"loading it took more than {_TORCH_S:g} s",
            "run the doctor again when the machine is less busy; a driver may hang",
        )
    if code != 0:
        last = (errors.strip().splitlines() or [f"exit code {code}"])[-1][:300]
        return fail("torch", "torch", f"it cannot be loaded: {last}", "pip install torch")
    try:
        # A library may print before it; ours is the last line.
        return TorchView.model_validate_json(output.strip().splitlines()[-1])
    except (ValidationError, IndexError):
        return fail("torch", "torch", f"it says: {output.strip()[:300]}", "pip install torch")


async def _ask_driver() -> DriverView:
    if shutil.which(_ASK_DRIVER[0]) is None:
        return DriverView()
    code, output, errors = await _run(_DRIVER_S, *_ASK_DRIVER)
    if code is None:
        return DriverView(problem=f"no answer within {_DRIVER_S:g} s")
    return read_driver(code, output, errors)


def read_driver(code: int, output: str, errors: str) -> DriverView:
    """What ``nvidia-smi`` said."""
    rows = [[cell.strip() for cell in line.split(",")] for line in output.strip().splitlines()]
    if code != 0 or not rows or any(len(row) < 3 for row in rows):
        said = (errors.strip() or output.strip() or f"exit code {code}").splitlines()[0]
        return DriverView(problem=said[:300])
    return DriverView(gpus=tuple(row[0] for row in rows), driver=rows[0][1])


async def _run(deadline_s: float, *command: str) -> tuple[int | None, str, str]:
    """The command's exit code and what it said; no code when it did not end in time."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_MAX_OUTPUT_BYTES,
    )
    try:
        async with asyncio.timeout(deadline_s):
            said: tuple[Any, Any] = await process.communicate()
    except TimeoutError:
        return None, "", ""
    finally:
        if process.returncode is None:
            # One stuck in its driver does not heed even this; it is not waited for for long.
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                process.kill()
                async with asyncio.timeout(_END_S):
                    await process.wait()
    output, errors = (part[:_MAX_OUTPUT_BYTES].decode(errors="replace") for part in said)
    return process.returncode, output, errors
