//! The command line: one file a command, which owns its arguments and its output.
