"""The parts of a transformer block: layer normalisation, the MLP, linear layers and their float8 form."""
