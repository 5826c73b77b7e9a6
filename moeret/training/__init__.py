"""Learning experts and routers."""
