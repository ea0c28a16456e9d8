"""The shared parameters, the optimizer's state and the counters, behind two protocols."""
