"""Running compressed models: in other runtimes, on this machine's caches, and for several users at a time."""
