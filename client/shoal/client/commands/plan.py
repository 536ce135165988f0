"""``shoal plan``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.client.commands.options import FiniteRange, output_option
from shoal.client.output import Output

if TYPE_CHECKING:
    from shoal.protocol.job import JobSpec
    from shoal.rl.capacity.report import CapacityPlan

_BASES = ("fp32", "bf16", "int8", "int4", "ternary")


@dataclass(frozen=True, kw_only=True)
class _Guess:
    """What only the run itself will tell; absent takes the job's own limits."""

    prompt_tokens: int | None
    completion_tokens: float | None
    teaching_share: float


def _guess_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the lengths and shares a plan has to guess, passed as one `_Guess` ``guess``."""

    @click.option("--prompt-tokens", type=click.IntRange(min=1), help="Length of a prompt.")
    @click.option(
        "--completion-tokens",
        type=FiniteRange(min=1),
        help="Mean length of a completion; sampling.max_tokens when absent.",
    )
    @click.option(
        "--teaching-share",
        type=FiniteRange(min=0, max=1, min_open=True),
        default=1.0,
        show_default=True,
        help="Share of groups whose rewards differ.",
    )
    @functools.wraps(command)
    def wrapped(
        *args: Any,
        prompt_tokens: int | None,
        completion_tokens: float | None,
        teaching_share: float,
        **rest: Any,
    ) -> Any:
        guess = _Guess(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            teaching_share=teaching_share,
        )
        return command(*args, guess=guess, **rest)

    return wrapped


@click.command("plan")
@click.argument("job_file", type=click.Path(path_type=Path), metavar="JOB.toml")
@click.option(
    "--model",
    metavar="1B|3B|8B|70B|1T|NAME|config.json",
    help="Plan for another model than the job's.",
)
@click.option(
    "--pool", "pool_file", type=click.Path(path_type=Path), help="The machines to plan with."
)
@click.option(
    "--base",
    type=click.Choice(_BASES),
    default="fp32",
    show_default=True,
    help="How the base lies in memory; workers load fp32.",
)
@_guess_options
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@output_option
def command(
    job_file: Path,
    model: str | None,
    pool_file: Path | None,
    base: str,
    settings: tuple[str, ...],
    guess: _Guess,
    output: Output,
) -> int:
    """Say what a job needs before anything is paid: memory, traffic, time and money.

    With --pool, also which machines can do which task, how long the job takes on them and
    what bounds it. Examples of a pool: examples/pool.toml.
    """
    from shoal.client.jobfile import load_job_file
    from shoal.rl.loss_traps import job_warnings

    spec = load_job_file(job_file, settings)
    for sentence in job_warnings(spec):
        output.warn(f"warning: {sentence}")
    _show(_plan(spec, model or spec.model, base, guess, pool_file), output)
    return 0


def _plan(
    spec: JobSpec, model: str, base: str, guess: _Guess, pool_file: Path | None
) -> CapacityPlan:
    from shoal.client.poolfile import load_pool_file
    from shoal.rl.capacity.footprint import BaseFormat, Setup
    from shoal.rl.capacity.known_models import find_shape
    from shoal.rl.capacity.plan import plan_capacity
    from shoal.rl.capacity.prompt_length import PromptLength, prompt_length
    from shoal.rl.capacity.volume import Expectation

    shape = find_shape(model)
    if guess.prompt_tokens is None:
        length = prompt_length(spec.model_copy(update={"model": model}))
    else:
        length = PromptLength(mean=guess.prompt_tokens, longest=guess.prompt_tokens)
    longest = spec.sampling.max_tokens
    setup = Setup(shape=shape, spec=spec, prompt_tokens=length.longest, base=BaseFormat(base))
    expected = Expectation(
        prompt_tokens=length.mean,
        completion_tokens=min(guess.completion_tokens or longest, longest),
        teaching_share=guess.teaching_share,
    )
    pool = None if pool_file is None else load_pool_file(pool_file)
    return plan_capacity(setup, expected, pool)


def _show(plan: CapacityPlan, output: Output) -> None:
    from shoal.client.plan_view import plan_json, plan_picture

    if output.json_mode:
        output.emit(plan_json(plan))
    else:
        output.say(*plan_picture(plan))
