"""An hour of a run whose clients come and go, with faults all the while: ``make soak``."""
