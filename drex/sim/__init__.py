"""A machine that isn't there: the same engine and control code over virtual time."""
