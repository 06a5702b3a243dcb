"""The page of `sat-ext preview`: what a model will see of a data set."""
