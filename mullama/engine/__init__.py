"""The engine: one thread a model, commands in, records out. Internal.

engine      the thread, its step, and what a model can be asked for
client      what the rooms above may ask (protocols; no compiled code)
parts       what the parts of one engine share
commands    what other threads ask of the engine thread
kv_control  ``engine.kv``
background  work that steps back behind running streams
planning/   ``engine.planning``: the policy, its plans and what they become
requests/   one request: its prompt, its life, its tokens on their way to whoever reads them
weights/    ``engine.weights``: load, change, unload, LoRA
memory/     what an engine takes
"""
