"""`python -m benchmarks NAME [--quick] --json FILE`; each suite also runs under `pytest benchmarks/`."""
