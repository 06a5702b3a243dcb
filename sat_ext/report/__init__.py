"""`sat-ext report`: one page about a run, from the files that it leaves."""
