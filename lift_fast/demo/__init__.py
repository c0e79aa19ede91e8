"""The built-in data sets of `lift-fast data` and `lift-fast demo`."""
