"""The parts of `make gpu`.

plan.py divides the time among the phases, phases.py runs the phases, jobs.py runs their processes with time limits, and
report.py makes the final table. The others run in processes of their own: machine.py describes the machine, ceilings.py
measures what the device can reach, smoke.py tests each kernel, outcomes.py records the outcome of each test, sweep.py
times candidate settings, and hot.py profiles the hottest kernels with ncu.
"""
