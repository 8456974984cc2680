"""Numbers that the control plane goes by, with what they count and why they are so large. None changes any output."""

from __future__ import annotations

import math

from drex.config import FILL_ROWS

# What passes cost

MACHINE_WEIGHT = 0.05
"""Weight of a new observation in the machine's correction."""
PROFILE_WEIGHT_PASSES = 8.0
"""Observations of a segment's passes that the profile counts as."""
CORRECTION_WEIGHT = 0.015
"""Weight of an observation of a size of pass once many were made: machines change."""
AT_ONCE_KNOWN_PASSES = 20
"""Passes over all segments that tell what these take beside segments one by one."""
CLIP_LOG, CLIP_OF_SIZE_LOG = math.log(4.0), 0.1
"""One observation counts as at most this far off, as a logarithm: a pause of the machine is no new machine. For its
size of pass it counts as less: what is far off is the machine first of all."""
ERROR_WINDOW_PASSES = 4096
"""Passes over which errors of the cost model are reported."""

# Exit rates

EXIT_RATE_PRIOR, EXIT_RATE_PRIOR_ROWS = 0.5, 8.0
"""Before any row was seen, as if this share of this many rows had exited."""
EXIT_RATE_MEMORY_ROWS = 500.0
"""Rows over which exit rates are remembered: older ones fade by a factor e for each of these."""
EXIT_RATE_KNOWN_ROWS = 128.0
"""Rows at an exit point, the prior's included, from which on exit rates are more than a prior."""
LEAST_EXIT_RATE, MOST_EXIT_RATE = 1e-9, 1 - 1e-9
"""Exit rates are taken to lie between these: at 0 and 1 some states lead nowhere."""

# The decision rule

REFRESH_PASSES = 16
"""Passes between refreshes of the tables that decisions are read from."""
EACH_SIZE_BELOW, SIZE_STEP = 32, 8
"""Of the ready rows that may start, each count below the first is considered; from there on multiples of the second,
and all of them."""
EARNINGS_MEMORY_PASSES = 128.0
"""Passes over which earnings are averaged."""
EARNINGS_FADE = math.exp(-1.0 / EARNINGS_MEMORY_PASSES)
EARNINGS_KNOWN_PASSES = 64
"""Passes that tell what checking exits earns, after as many that don't: costs and drafts are learnt first."""
LEAST_PROMPT_ROWS = 16
"""Prompt rows that a pass may have whatever is due: prompts are never starved by deadlines."""

# The optimum

TWO_EXITS_UNITS = 32
"""Requests that two exit points are solved for while serving; more are counted in units of several, which costs some
0.1 %."""
TWO_EXITS_MOST_REQUESTS = 64
"""Requests that two exit points are solved for elsewhere: 2,145 states."""
POLICY_ITERATION_ROUNDS = 50
"""Rounds after which policy iteration stops, converged or not."""
SOLVE_DELAY_PASSES = 16
"""Passes between asking for a solution and using it, at least."""
SOLUTION_LIFETIME_PASSES = 256
"""Passes after which it is solved again, if nothing calls for that before."""
LOAD_MOVED_SHARE, EXIT_RATE_MOVED = 0.25, 0.1
"""What calls for it: the number of decoding requests has changed by this share, or an exit rate by this much."""
OWED_TAIL_DEVIATIONS = 7.0
"""Standard deviations of the number of owed fills that are summed over, three more above the mean than below."""
OWED_POINTS = 513
"""Counts of owed fills that are summed over: all of them for few requests, every so many for more."""
OWED_MOST_FILLS = 8192
"""Owed fills from which on only their mean counts: each one more costs the same then."""
MOST_OWED_ROWS = FILL_ROWS
"""Fills that an engine lets be owed, if nothing else is said."""

# `adaptive`: exits are not checked while that does not pay

PROBE_EVERY_PASSES = 64
"""While exits are not checked, one pass in this many checks them all the same, to notice when it would pay."""
PROBE_PASSES = 16
"""Under run-ahead this many in a row check: what they earn shows once buffers have filled and were flushed."""
PROBE_WEIGHT = 8
"""A probe's rows count this many times for exit rates: for those of all passes since the last probe."""
SURE_GAIN = 1.6
"""Where checking exits promises less than this many times full depth, full depth is tried: first after `PROBE_PASSES`
passes, then each time after twice as many, up to `PROBE_EVERY_PASSES` * `PROBE_PASSES`."""
TRIAL_PASSES = 4
"""Passes of such a trial: the first after others may take longer than in a row."""

# Run-ahead

CONFIDENCE_BINS = 16
"""Bins of confidence in which it is learnt how often drafts are accepted."""
ACCEPTANCE_PRIOR_TOKENS = 4.0
"""As if this many tokens of each bin had been accepted in the share that its confidence says."""
ACCEPTANCE_MEMORY_TOKENS = 1000.0
"""Tokens over which acceptance is learnt: older ones fade by a factor e for each of these."""
ACCEPTANCE_FADE = math.exp(-1.0 / ACCEPTANCE_MEMORY_TOKENS)
ACCEPTANCE_FIT_TOKENS = 8
"""Tokens of an exit point after which its chances follow what was learnt."""
