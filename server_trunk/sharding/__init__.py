"""One trunk on several ranks: a leader that clients talk to, and followers that run what it runs."""
