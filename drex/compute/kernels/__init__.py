"""Triton kernels, each with the function that launches it. Nothing else imports triton.

Row counts that a kernel must keep to are read on the device (`counts`: full rows, and rows that only write K/V, which
lie behind the room for full ones), so that a CUDA graph with room for more rows can be replayed for fewer. On a CPU
they run in Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
"""
