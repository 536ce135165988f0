"""A worker on a Ray cluster of its own leaves in its own time when it is told to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from shoal.client.devnet_files import write_toml


def test_sigterm_is_the_workers_own_even_after_ray_has_started(tmp_path: Path) -> None:
    config = tmp_path / "worker.toml"
    write_toml(
        config,
        {
            # Nobody listens at the discard port: the worker keeps dialling.
            "orchestrator": "http://127.0.0.1:9",
            "data_dir": tmp_path / "data",
            "connect_timeout_s": 600,
            "ray": {"address": "local", "actors": 1},
        },
    )
    command = [sys.executable, "-m", "shoal.worker", "--config", str(config)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as worker:
        try:
            assert worker.stdout is not None
            lines = iter(worker.stdout)
            assert any('"site_joined"' in line for line in lines)
            worker.send_signal(signal.SIGTERM)
            # Ray's handler would say so, and abort the process if leaving took three seconds.
            said = "".join(lines)
            assert "SIGTERM received" not in said
            assert worker.wait() == 0, said
        finally:
            worker.kill()
