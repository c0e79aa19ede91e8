"""`make gpu`, in parts: a plan of seconds (plan), processes under one clock (jobs), the phases (phases), their table
(report); and in processes of their own: what the machine is (machine), what it does at most (ceilings), a smoke of each
kernel (smoke), the tests' outcomes (outcomes), sweeps of settings (sweep), the hottest kernels for ncu (hot)."""
