"""What each fused op is, one file an op: its reference, its registration with torch, its choice of backend.

`from lift_fast.ops.rows.dequant import dequant`: a module and its function share a name, so none is exported here.
"""
