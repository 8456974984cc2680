"""Policies against each other and against the optimum, in real and in virtual time; advice."""
