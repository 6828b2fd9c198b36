"""Bugs to plant into the Hopper kernels with a warp that only copies, and what the simulator or the comparison has to say."""

ROW_BUGS = ()
COLUMN_BUGS = ()
