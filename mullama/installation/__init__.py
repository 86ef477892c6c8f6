"""What was installed here: its version, and whether its compiled part is whole and runs on this processor."""

VERSION = "0.1.0"
