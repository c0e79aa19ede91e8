"""Data sets: reading, decoding and ordering their images and captions."""
