"""``python -m shoal.client`` is the ``shoal`` command."""

from shoal.client.command import main

main()
