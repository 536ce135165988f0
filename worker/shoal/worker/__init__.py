"""The provider's process: it bids for work, does it, hands it in and collects the pay.

`shoal.worker.main` runs it; `shoal.worker.config` says how it is set up.  Nothing here needs
an inbound port: the worker dials the orchestrator and is called back over that connection.
"""

from shoal.worker.config import WorkerConfig, load_config

__all__ = ["WorkerConfig", "load_config"]
