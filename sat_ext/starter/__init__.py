"""`sat-ext init`: from a folder of clips and stills to the YAML of a run."""
