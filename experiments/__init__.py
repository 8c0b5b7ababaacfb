"""The entry point of every experiment, and what happens around a run: W&B, the sweep's summary."""
