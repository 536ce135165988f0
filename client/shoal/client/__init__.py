"""The requester's side: the SDK, the ``shoal`` command, the one-machine devnet."""
