"""What a run takes of a GPU's and a host's memory, predicted from its YAML before any of it is built."""
