"""Training on several hosts of a Ray cluster; imported only when `A3C(cluster=…)` asks for it."""
