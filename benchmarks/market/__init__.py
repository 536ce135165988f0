"""How fast a lot is cleared and certified, and a bid's signature checked."""
