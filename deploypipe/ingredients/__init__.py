"""What several algorithms are made of: projections, gates, sub-networks, statistics of channels, simulated annealing, ..."""
