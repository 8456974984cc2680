"""What a pass computes, in torch. Decides nothing: which rows, how deep and when are given by `drex.control`."""
