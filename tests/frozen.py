"""Last of what the server of processes loads: its children need not search all that for garbage."""

import gc

gc.collect()
gc.freeze()
