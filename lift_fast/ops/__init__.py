"""The fused ops, in four families: pairs, attention, transformer and rows. `block` combines attention and transformer.

An op's module has its reference, its registration with torch and its public function. A family's contract.py defines
what its backends receive and compute; a backend is a module of its name. Import ops from their modules, as in
`from lift_fast.ops.rows.dequant import dequant`: a module and its function share a name, so none is exported here.
"""
