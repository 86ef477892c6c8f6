"""The command line: one file a command, each with a click command called ``command``. Internal.

Modules here import only click at the top; what a command needs beyond that is imported when it runs.
"""
