"""The sampling loop, keyed noise, and the ledger of what it took."""
