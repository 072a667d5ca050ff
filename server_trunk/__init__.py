"""The trunk server: the blocks between the two cuts, hosted for many clients at once."""
