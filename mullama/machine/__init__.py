"""The machine: what the processor, its system and this build carry. No other room asks the system itself.

processor  name, family, instruction sets, whether AMX tiles may be used
cgroups    the control groups of this process, of version 1 and 2, and what they limit
cores      cores that this process may use: affinity, CPU sets, quotas; how many threads compute best
memory     memory that can be used, in the machine and within the limits of control groups
"""
