"""Experiments: ``run`` starts them, ``config`` composes ``conf/`` without a run, ``mirror`` copies records to W&B and
trackio, ``summary`` ends a sweep with a table, and ``benchmarks`` holds one program for each question about a part."""
