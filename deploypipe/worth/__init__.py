"""What widths and scores are worth, measured: losses on held-out images, their curves, which scores tell channels apart."""
