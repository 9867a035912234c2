"""The command line: how every job reads its flags and ends."""
