"""From files to batches, one module a stage."""
