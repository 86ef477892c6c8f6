"""The engine: one thread a model, commands in, records out. Internal.

client      what the rooms above may ask (a protocol; no compiled code)
lifecycle   the states of a sequence
sizing      automatic context, parallelism, GPU layers
loading     from a file and a configuration to a Core
engine      the thread
reader      from the token ring to the requests' readers
generation  the reader's end of a request
"""
