"""The machine: what the processor, its system and this build carry. No other room asks the system itself. Internal.

processor  name, family, instruction sets, whether AMX tiles may be used
cgroups    the control groups of this process, of version 1 and 2, and what they limit
cores      cores that this process may use: affinity, CPU sets, quotas; how many threads compute best
memory     memory that can be used, in the machine and within the limits of control groups
folders    folders that a server writes to, each tried
ways       ways of computing products of weights, proven and timed (kernels, trials, choice, remembered)
report     all of it as one object, and what a benchmark notes of it
"""
