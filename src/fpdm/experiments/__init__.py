"""Train, sample and measure together."""
