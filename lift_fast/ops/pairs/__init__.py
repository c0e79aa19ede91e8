"""The losses over all pairs of a batch: contrastive, sigmoid; and cosine, which needs the matching pairs only."""
