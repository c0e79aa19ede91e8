"""Rows of quantized vectors: the codecs, and gathering and widening of rows."""
