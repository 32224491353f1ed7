"""How many channels of each group to keep under a budget: an exact allocator."""
