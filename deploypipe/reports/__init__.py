"""What was found out: the report of a run, runs side by side, and the ledger of all measured runs; as values and as text."""
