"""Which segment runs next, and the optimum that decisions are held against."""
