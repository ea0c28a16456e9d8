"""Training on several hosts. Only the exchange between their stores is there yet."""
