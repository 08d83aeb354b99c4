"""Load on the service, over loopback, both sides of every comparison in one run."""
