"""Many actor-learners at once: the collector in the main process, and the main loop of a worker process."""
